"""Parameters that the module holds besides its layers: lists of its own, optimizers that it steps itself."""

import weakref
from collections import namedtuple

import pytest
import torch
from lightning import Callback, LightningModule
from torch import nn
from torch.nn import functional as F

from actprune.core.budget import Budget
from actprune.training import load_task
from actprune.training.references import followed
from foreign import OneNetwork, loader


class Penalty:
    """No module."""

    def __init__(self, parameters):
        self.parameters = list(parameters)
        self.first = self.parameters[0]


class Lists(OneNetwork):
    """Regularises a list of parameters."""

    def configure_optimizers(self):
        matrices = [p for p in self.model.parameters() if p.dim() > 1]
        self.regularised, self.pairs, self.by_name = matrices, (matrices[0], {matrices[1]}), {"last": [matrices[2]]}
        self.penalty = Penalty(matrices)
        return super().configure_optimizers()

    def training_step(self, batch, batch_idx):
        return super().training_step(batch, batch_idx) + 1e-4 * sum(p.abs().sum() for p in self.regularised)


class Follow(Callback):
    def on_train_start(self, trainer, pl_module):
        self.optimizer = torch.optim.SGD(pl_module.model[0].parameters(), 0.001)
        self.statistics = {pl_module.model[1].running_mean: pl_module.model[0].weight}


def test_lists_of_parameters_follow(pruning, trainer):
    module, callback, other = Lists(), pruning(), Follow()
    trainer(other, callback).fit(module, loader(), loader(32, 1))
    assert callback.stopped["reason"] == "budget"
    first, second, third = (p for p in module.model.parameters() if p.dim() > 1)
    for ours, layers in zip(module.regularised, (first, second, third), strict=True):
        assert ours is layers
    assert module.pairs[0] is first
    assert module.pairs[1] == {second}
    assert module.by_name["last"][0] is third
    assert module.penalty.parameters[1] is second
    assert module.penalty.first is first
    ((key, value),) = other.statistics.items()
    assert key is module.model[1].running_mean
    assert value is first
    assert other.optimizer.param_groups[0]["params"][0] is first


class FromTheStart(OneNetwork):
    def __init__(self):
        super().__init__()
        self.regularised = list(self.model.parameters())


def test_lists_of_parameters_follow_a_checkpoint(pruning, trainer, tmp_path):
    first, resumed = FromTheStart(), FromTheStart()
    run = trainer(pruning())
    run.fit(first, loader(), loader(32, 1))
    run.save_checkpoint(tmp_path / "last.ckpt")
    trainer(pruning(), max_epochs=7).fit(resumed, loader(), loader(32, 1), ckpt_path=tmp_path / "last.ckpt")
    for module in (resumed, load_task(FromTheStart, tmp_path / "last.ckpt")):
        assert module.model[0].out_channels < OneNetwork().model[0].out_channels
        for ours, present in zip(module.regularised, module.model.parameters(), strict=True):
            assert ours is present


class OwnOptimizer(OneNetwork):
    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def configure_optimizers(self):
        self.own = {"all": torch.optim.SGD(self.model.parameters(), 0.05, momentum=0.9)}

    def training_step(self, batch, batch_idx):
        self.own["all"].zero_grad()
        self.manual_backward(F.cross_entropy(self.model(batch[0]), batch[1]))
        self.own["all"].step()


@pytest.mark.parametrize("guard", [{}, {"max_metric_drop": 0.0, "monitor": "val_loss", "budget": Budget(params=0.1)}])
@pytest.mark.filterwarnings("ignore:`LightningModule.configure_optimizers` returned `None`")
def test_an_optimizer_that_the_module_steps_itself_follows(guard, pruning, trainer):
    module, callback = OwnOptimizer(), pruning(**guard)
    trainer(callback, max_epochs=8).fit(module, loader(), loader(32, 1))
    assert any(event.get("went_back") for event in callback.events) == bool(guard)
    optimizer = module.own["all"]
    assert {id(p) for p in optimizer.param_groups[0]["params"]} == {id(p) for p in module.parameters()}
    assert set(optimizer.state) == set(module.parameters())
    for parameter, state in optimizer.state.items():
        assert state["momentum_buffer"].shape == parameter.shape


class ReadOnly:
    """Keeps a parameter where its own property, which has no setter, stands in the way."""

    def __init__(self, weight):
        vars(self)["weight"] = weight

    @property
    def weight(self):
        return vars(self)["weight"]


class Unbound:
    """As the proxies of frameworks are, outside what they stand for."""

    @property
    def __dict__(self):
        raise RuntimeError("unbound")


Named = namedtuple("Named", "weight")


def test_odd_objects_follow_or_are_left_alone():
    module = LightningModule()
    module.layer = nn.Linear(3, 3)
    weight = module.layer.weight
    gone, kept, shared = ReadOnly(weight), ReadOnly(weight), (weight,)
    module.one, module.other, module.named = shared, shared, Named(weight)
    module.gone, module.there, module.kept, module.unbound = weakref.proxy(gone), weakref.proxy(kept), kept, Unbound()
    far = ReadOnly([weight])
    module.above, module.zenith = {1: {2: {3: far}}}, far  # met first where nothing deeper is looked at
    del gone
    with followed(module):
        module.layer.weight = nn.Parameter(torch.zeros(2, 3))
    assert module.kept.weight is module.layer.weight
    assert module.there.weight is module.layer.weight
    for holder in (module.one, module.other, module.named, module.zenith.weight):
        assert holder[0] is module.layer.weight
    assert isinstance(module.named, Named)
