"""The callback keeps every layer within its limits while training, pruning and resuming."""

import copy
import pickle

import pytest
import torch
from lightning import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn

from actprune.capacity import group_norm, linear_map, lipschitz_constant
from actprune.core.budget import Budget
from actprune.core.errors import ConfigError
from actprune.core.record import record_of
from actprune.surgery.tensors import keep_indices, sliced
from actprune.training import CapacityConstraint, ClassificationTask

SIDE = 6


def network():
    return nn.Sequential(
        nn.Conv2d(1, 6, 3, padding=1), nn.ReLU(), nn.Conv2d(6, 8, 3, stride=2), nn.ReLU(), nn.Flatten(), nn.Linear(32, 4)
    )


def task(lr=0.1):
    return ClassificationTask(network(), lambda parameters: torch.optim.Adam(parameters, lr=lr), 4)


def loader(n=64):
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(n, 1, SIDE, SIDE, generator=generator)
    labels = torch.randint(4, (n,), generator=generator)
    return torch.utils.data.DataLoader(list(zip(images, labels, strict=True)), 16)


def constants(net):
    shapes = {"0": (SIDE, SIDE), "2": (SIDE, SIDE), "5": ()}
    found = {}
    for path, size in shapes.items():
        layer = net.get_submodule(path)
        channels = layer.weight.shape[1]
        found[path] = lipschitz_constant(linear_map(layer, (channels, *size), torch.float64))
    return found


def distances(net, initial):
    return {
        path: float(group_norm(layer.weight.detach() - initial[f"{path}.weight"]))
        for path, layer in net.named_modules()
        if hasattr(layer, "weight")
    }


class AtValidation(Callback):
    """What validation ends with."""

    def __init__(self):
        self.seen = []

    def on_validation_end(self, trainer, pl_module):
        if not trainer.sanity_checking:
            self.seen.append(constants(pl_module.net))


def test_without_limits_the_same_training_exceeds_them(trainer):
    module = task()
    initial = copy.deepcopy(module.net.state_dict())
    trainer(max_epochs=3).fit(module, loader(), loader())
    assert max(constants(module.net).values()) > 2.5
    assert max(distances(module.net, initial).values()) > 8


@pytest.mark.parametrize("sanity", [0, 1])
def test_constants_stay_under_the_limit(trainer, sanity):
    module, seen = task(), AtValidation()
    trainer(CapacityConstraint(lipschitz=0.7, every=3), seen, max_epochs=3, num_sanity_val_steps=sanity).fit(
        module, loader(), loader()
    )
    assert len(seen.seen) == 3
    assert all(value <= 0.7 * 1.003 for found in seen.seen for value in found.values())
    assert max(constants(module.net).values()) > 0.6


class ByKeyword(nn.Sequential):
    def forward(self, x):
        for layer in self:
            x = layer(input=x)
        return x


def test_a_convolution_that_is_called_by_keyword_is_constrained_too(trainer):
    module = task()
    module.net = ByKeyword(*module.net)
    trainer(CapacityConstraint(lipschitz=0.3), max_epochs=1).fit(module, loader(), loader(16))
    assert max(constants(module.net).values()) <= 0.3 * 1.002


def test_distances_stay_under_the_limit(trainer):
    module = task()
    initial = copy.deepcopy(module.net.state_dict())
    trainer(CapacityConstraint(distance=2.0), max_epochs=3).fit(module, loader(), loader())
    found = distances(module.net, initial)
    assert all(value <= 2.0 * (1 + 1e-5) for value in found.values())
    assert max(found.values()) == pytest.approx(2.0, rel=1e-4)


def test_a_distance_of_zero_freezes_weights(trainer):
    module = task()
    initial = copy.deepcopy(module.net.state_dict())
    trainer(CapacityConstraint(distance=0.0, every=1), max_epochs=1).fit(module, loader(), loader())
    assert all(value == 0 for value in distances(module.net, initial).values())
    assert not torch.equal(module.net[0].bias, initial["0.bias"])


def test_first_weights_over_the_limit_are_scaled_and_count_as_the_initialisation(trainer):
    module = task()
    with torch.no_grad():
        module.net[0].weight.mul_(10)
    before = module.net[0].weight.detach().clone()
    trainer(CapacityConstraint(lipschitz=1.0, distance=0.0, every=1), max_epochs=1).fit(module, loader(), loader())
    ratio = module.net[0].weight.detach() / before
    torch.testing.assert_close(ratio, torch.full_like(ratio, float(ratio.mean())), rtol=1e-4, atol=1e-5)
    assert constants(module.net)["0"] == pytest.approx(1.0, rel=2e-3)


def test_only_named_modules(trainer):
    module = task()
    initial = copy.deepcopy(module.net.state_dict())
    trainer(CapacityConstraint(distance=0.0, every=1, modules=["net.0"]), max_epochs=1).fit(module, loader(), loader())
    found = distances(module.net, initial)
    assert found["0"] == 0
    assert found["2"] > 0
    assert found["5"] > 0


def test_together_with_pruning(trainer, pruning):
    module = task()
    initial = copy.deepcopy(module.net.state_dict())
    callbacks = pruning(), CapacityConstraint(lipschitz=2.0, distance=6.0)
    trainer(*callbacks, max_epochs=6).fit(module, loader(), loader())
    record = record_of(module.net)
    assert record.widths
    cut = {
        name: sliced(tensor, {d: keep_indices(tensor.shape[d], gone) for d, gone in record.removed.get(name, {}).items()})
        for name, tensor in initial.items()
    }
    assert all(value <= 2.0 * 1.003 for value in constants(module.net).values())
    assert all(value <= 2.0 for value in constants(_with(initial)).values())  # nothing was scaled
    assert all(value <= 6.0 * (1 + 1e-5) for value in distances(module.net, cut).values())


def test_a_network_that_was_pruned_before_is_constrained_and_pruned_further(trainer, pruning):
    module = task()
    trainer(pruning(budget=Budget(params=0.7))).fit(module, loader(), loader())
    initial, before = copy.deepcopy(module.net.state_dict()), copy.deepcopy(record_of(module.net).removed)
    limit = max(constants(module.net).values())
    trainer(pruning(), CapacityConstraint(lipschitz=2 * limit, distance=1.0)).fit(module, loader(), loader())
    after = record_of(module.net).removed
    assert before
    assert after != before
    for name, dims in after.items():
        for dim, gone in dims.items():
            first = before.get(name, {}).get(dim, [])
            stayed = [i for i in range(initial[name].shape[dim] + len(first)) if i not in first]
            keep = torch.tensor([k for k, i in enumerate(stayed) if i not in gone])
            initial[name] = initial[name].index_select(dim, keep)
    assert all(value <= 1.0 + 1e-5 for value in distances(module.net, initial).values())


def _with(state):
    net = network()
    net.load_state_dict(state)
    return net


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
def test_a_resumed_run_keeps_its_initialisation(trainer, tmp_path):
    module = task()
    initial = copy.deepcopy(module.net.state_dict())
    saving = ModelCheckpoint(tmp_path, save_last=True)
    trainer(CapacityConstraint(distance=2.0), saving, max_epochs=1, enable_checkpointing=True).fit(module, loader(), loader())
    resumed = task()
    callback = CapacityConstraint(distance=2.0)
    trainer(callback, max_epochs=3).fit(resumed, loader(), loader(), ckpt_path=tmp_path / "last.ckpt")
    found = distances(resumed.net, initial)
    assert all(value <= 2.0 * (1 + 1e-5) for value in found.values())
    assert max(found.values()) == pytest.approx(2.0, rel=1e-4)


def test_hooks_leave_with_the_run(trainer):
    module = task()
    trainer(CapacityConstraint(lipschitz=1.0), max_epochs=1).fit(module, loader(), loader())
    assert not any(layer._forward_pre_hooks for layer in module.modules())


class Saves(Callback):
    """What a pickled copy of the network returns, and what the network does."""

    def on_train_epoch_end(self, trainer, pl_module):
        x = torch.randn(2, 1, SIDE, SIDE)
        with torch.no_grad():
            self.seen = pickle.loads(pickle.dumps(pl_module.net))(x), pl_module.net(x)


def test_a_network_can_be_pickled_while_it_is_constrained(trainer):
    saves = Saves()
    trainer(saves, CapacityConstraint(lipschitz=1.0), max_epochs=1).fit(task(), loader(), loader())
    assert torch.equal(*saves.seen)


class Replaced(Callback):
    """Makes a layer wider, and tells nobody."""

    def on_train_epoch_end(self, trainer, pl_module):
        pl_module.net[5].weight = nn.Parameter(torch.zeros(5, 32))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "limit nothing"),
        ({"lipschitz": -1.0}, "lipschitz=-1.0 must be at least 0"),
        ({"distance": float("nan")}, "distance=nan must be at least 0"),
        ({"distance": 1.0, "every": 0}, "every=0 must be at least 1 optimizer step"),
        ({"distance": 1.0, "modules": "net"}, "modules='net' must be a list"),
    ],
)
def test_settings_that_cannot_work(options, message):
    with pytest.raises(ConfigError, match=message):
        CapacityConstraint(**options)


def test_modules_that_cannot_work(trainer):
    with pytest.raises(ConfigError, match="there is no 'net.9' in ClassificationTask"):
        trainer(CapacityConstraint(distance=1.0, modules=["net.9"])).fit(task(), loader(), loader())
    with pytest.raises(ConfigError, match="no convolution or linear layer"):
        trainer(CapacityConstraint(distance=1.0, modules=["net.1"])).fit(task(), loader(), loader())


def test_a_layer_that_others_change_is_refused(trainer):
    with pytest.raises(ConfigError, match=r"net.5.weight has shape \(5, 32\), its initialisation \(4, 32\)"):
        trainer(CapacityConstraint(distance=1.0, every=10**6), Replaced(), max_epochs=1).fit(task(), loader(), loader())
