"""SeReNe without Lightning: sensitivities against brute force, the update against a rule written by hand, the bisection."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from actprune import trace
from actprune.core.errors import ConfigError, ObservationError
from actprune.sparsity import InsensitivityDecay
from actprune.sparsity.preactivations import Sensitivities, preactivations
from actprune.sparsity.serene import insensitivity, largest_accepted, tolerated

CLASSES = 3


class Residual(nn.Module):
    """Two layers write one stream, a third one reads it."""

    def __init__(self):
        super().__init__()
        self.stem, self.conv1, self.conv2 = nn.Conv2d(2, 4, 3), nn.Conv2d(4, 5, 3, padding=1), nn.Conv2d(5, 4, 1)
        self.fc = nn.Linear(4, CLASSES)

    def forward(self, x):
        x = F.relu(self.stem(x))
        x = F.relu(x + self.conv2(F.relu(self.conv1(x))))
        return self.fc(x.mean((2, 3)))


def mlp():
    return nn.Sequential(nn.Linear(6, 7), nn.ReLU(), nn.Linear(7, 5), nn.Tanh(), nn.Linear(5, CLASSES))


def convolutions():
    layers = (nn.Conv2d(2, 4, 3), nn.ReLU(inplace=True), nn.ConvTranspose2d(4, 5, 2), nn.ReLU(inplace=True))
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(20, CLASSES))


def batch_norms():
    first = (nn.Conv2d(2, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU(inplace=True))
    model = nn.Sequential(*first, nn.Flatten(), nn.Linear(64, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, CLASSES))
    for norm in (model[1], model[5]):
        nn.init.uniform_(norm.weight, 0.5, 2)
        nn.init.normal_(norm.bias)
        norm.running_mean.normal_()
    return model


WHERE = {  # group -> modules whose outputs are the pre-activations, and the dimension of channels
    "mlp": (mlp, {"0": ["0"], "2": ["2"]}),
    "convolutions": (convolutions, {"0": ["0"], "2": ["2"]}),
    "batch_norms": (batch_norms, {"0": ["1"], "4": ["5"]}),
    "Residual": (Residual, {"stem": ["stem", "conv2"], "conv1": ["conv1"]}),
}


def build(name):
    torch.manual_seed(0)
    make, where = WHERE[name]
    x = torch.randn(5, 6) if name == "mlp" else torch.randn(5, 2, 6, 6)
    return make().double().eval(), x.double(), where


def brute_force(model, x, name, mode, whole_batch=False):
    """(U,) from the Jacobian with respect to the output of a module, sample by sample or of the summed batch."""
    module = model.get_submodule(name)
    kept = []
    handle = module.register_forward_hook(lambda _m, _a, out: kept.append(out.detach().clone()))
    model(x)
    handle.remove()

    def outputs(p, rows):
        handle = module.register_forward_hook(lambda *_: p.clone())
        try:
            said = model(x[rows])
        finally:
            handle.remove()
        return said.sum(0)

    total = 0
    for rows in [slice(None)] if whole_batch else [slice(i, i + 1) for i in range(len(x))]:
        p = kept[0][rows]
        jacobian = torch.autograd.functional.jacobian(lambda p, rows=rows: outputs(p, rows), p)  # (C, n, U, ...)
        size = jacobian.abs().sum(0) if mode == "full" else jacobian.sum(0).abs()
        total = total + size.sum(0).flatten(1).sum(1) if size.ndim > 2 else total + size.sum(0)
    return total / CLASSES / (kept[0].numel() / kept[0].shape[1])


@pytest.mark.parametrize("mode", ["full", "lower_bound"])
@pytest.mark.parametrize("name", WHERE)
def test_sensitivity_is_the_brute_force_jacobian(name, mode):
    model, x, where = build(name)
    watched = Sensitivities(model, trace(model, x), mode)
    with watched.watching():
        model(x[:2]), model(x[2:])  # two uneven batches
    found = watched.take()
    assert found.keys() == where.keys()
    for group, modules in where.items():
        expected = torch.stack([brute_force(model, x, module, mode) for module in modules]).amax(0)
        torch.testing.assert_close(found[group].double(), expected, rtol=1e-5, atol=1e-7)
        assert expected.max() > 0


@pytest.mark.parametrize("mode", ["full", "lower_bound"])
def test_in_training_mode_it_is_that_of_the_batchs_summed_outputs(mode):
    model, x, where = build("batch_norms")
    model.train()
    for norm in (model[1], model[5]):
        norm.track_running_stats = False  # brute force runs it often
    watched = Sensitivities(model, trace(model, x), mode)
    with watched.watching():
        model(x)
    for group, sensitivity in watched.take().items():
        expected = brute_force(model, x, where[group][0], mode, whole_batch=True)
        torch.testing.assert_close(sensitivity.double(), expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", WHERE)
def test_local_asks_whether_the_mean_pre_activation_is_positive(name):
    model, x, where = build(name)
    said = {module: [] for modules in where.values() for module in modules}
    for module, kept in said.items():  # before the copy that an activation in place overwrites
        model.get_submodule(module).register_forward_hook(lambda _m, _a, out, kept=kept: kept.append(out.detach().clone()))
    watched = Sensitivities(model, trace(model, x), "local")
    for kept in said.values():
        kept.clear()
    with watched.watching():
        model(x[:2]), model(x[2:])
    found = watched.take()
    for group, modules in where.items():
        means = [torch.cat(said[module]).movedim(1, 0).flatten(1).mean(1) for module in modules]
        assert torch.equal(found[group], (torch.stack(means).amax(0) > 0).float())
    assert {0.0, 1.0} == {value for sensitivity in found.values() for value in sensitivity.tolist()}


def test_training_gets_the_same_gradients_and_hooks_are_gone():
    model, x, _ = build("convolutions")
    twin = copy.deepcopy(model)
    watched = Sensitivities(model, trace(model, x))
    with watched.watching():
        F.cross_entropy(model(x), torch.arange(5) % CLASSES).backward()
    F.cross_entropy(twin(x), torch.arange(5) % CLASSES).backward()
    for ours, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(ours.grad, theirs.grad)
    assert not any(module._forward_hooks for module in model.modules())
    watched.take()
    with pytest.raises(ObservationError, match="training ran no Sequential whose outputs depend on a pre-activation"):
        watched.take()
    with watched.watching(), torch.no_grad():
        model(x)
    with pytest.raises(ObservationError, match="training ran no Sequential"):
        watched.take()


def test_several_processes_add_up():
    model, x, _ = build("mlp")
    whole, half, other = (Sensitivities(model, trace(model, x)) for _ in range(3))
    for watched, part in ((whole, x), (half, x[:1]), (other, x[1:])):
        with watched.watching():
            model(part)
    kept = []
    other.take(lambda flat: kept.append(flat) or flat)
    for name, sensitivity in half.take(lambda flat: flat + kept[0]).items():
        torch.testing.assert_close(sensitivity, whole.take()[name] if name == "0" else sensitivity)


def rule(model, twin_sensitivity, lam):
    """The paper's update by hand, on the mlp: rows of a unit, and the columns that the locked outputs read."""
    with torch.no_grad():
        for group, layer in (("0", model[0]), ("2", model[2])):
            factor = 1 - lam * (1 - twin_sensitivity[group]).clamp(min=0)
            layer.weight *= factor[:, None]
            if group == "2":
                model[4].weight *= factor[None, :]


OPTIMIZERS = {
    "sgd": lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9),
    "adamw": lambda params: torch.optim.AdamW(params, lr=0.01),
}


@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("mode", ["full", "lower_bound", "local"])
def test_the_update_is_the_papers(kind, mode):
    model, _, _ = build("mlp")
    twin = copy.deepcopy(model)
    ours, theirs = OPTIMIZERS[kind](model.parameters()), OPTIMIZERS[kind](twin.parameters())
    decay = InsensitivityDecay(model, trace(model, torch.randn(2, 6).double()), lam=0.1, mode=mode)
    generator = torch.Generator().manual_seed(2)
    for _ in range(5):
        x, y = torch.randn(8, 6, generator=generator).double(), torch.randint(0, CLASSES, (8,), generator=generator)
        if mode == "local":
            p0 = twin[0](x)
            sensitivity = {"0": p0.mean(0) > 0, "2": twin[2](p0.relu()).mean(0) > 0}
            sensitivity = {group: positive.double() for group, positive in sensitivity.items()}
        else:
            sensitivity = {group: brute_force(twin, x, group, mode) for group in ("0", "2")}
        theirs.zero_grad()
        F.cross_entropy(twin(x), y).backward()
        theirs.step()
        rule(twin, sensitivity, 0.1)

        ours.zero_grad()
        with decay.watching():
            loss = F.cross_entropy(model(x), y)
        loss.backward()
        ours.step()
        decay.step()
    for mine, expected in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(mine, expected, rtol=1e-6, atol=1e-8)
    assert not torch.allclose(model[0].weight, build("mlp")[0][0].weight)


def test_what_is_cut_at_positions_and_what_is_frozen():
    """A fused projection is gathered; a frozen layer stays; norm scales decay, shifts do not."""
    model, x, _ = build("batch_norms")
    model[0].weight.requires_grad_(False)
    before = copy.deepcopy(model.state_dict())
    decay = InsensitivityDecay(model.train(), trace(model, x), lam=1.0, mode="local")
    with decay.watching():
        model(x)
    sensitivity = decay.step()
    off = {group: said == 0 for group, said in sensitivity.items()}
    assert all(mask.any() for mask in off.values())
    assert torch.equal(model[0].weight, before["0.weight"])
    assert torch.equal(model[1].weight, torch.where(off["0"], 0.0, before["1.weight"]))
    assert torch.equal(model[4].weight, torch.where(off["4"][:, None], 0.0, before["4.weight"]))
    assert torch.equal(model[7].weight, torch.where(off["4"], 0.0, before["7.weight"]))
    for name, tensor in model.named_parameters():
        if name.endswith("bias"):
            assert torch.equal(tensor, before[name])


class Fused(nn.Module):
    """One projection for query, key and value; heads are units."""

    def __init__(self):
        super().__init__()
        self.num_heads = 2
        self.qkv, self.out, self.head = nn.Linear(6, 24), nn.Linear(8, 6), nn.Linear(6, CLASSES)

    def forward(self, x):
        q, k, v = self.qkv(x).reshape(*x.shape[:2], 3, self.num_heads, 4).permute(2, 0, 3, 1, 4).unbind(0)
        x = self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return self.head(x.mean(1))


def test_heads_of_a_fused_projection():
    torch.manual_seed(0)
    model, x = Fused().double(), torch.randn(3, 5, 6).double()
    graph = trace(model, x)
    (place, *_) = (place for place in preactivations(model, graph) if place.module == "qkv")
    assert place.positions.shape == (2, 12)
    decay = InsensitivityDecay(model, graph, lam=0.5)
    before = model.qkv.weight.detach().clone()
    with decay.watching():
        model(x)
    factor = 1 - 0.5 * insensitivity(decay.step()["qkv"]).double()
    expected = before.clone()
    for head in range(2):
        for part in range(3):
            rows = slice(8 * part + 4 * head, 8 * part + 4 * head + 4)
            expected[rows] *= factor[head]
    torch.testing.assert_close(model.qkv.weight.detach(), expected)
    assert (factor < 1).all()


@pytest.mark.parametrize("mode", ["full", "lower_bound"])
def test_under_autocast_the_weights_stay_in_their_precision(mode):
    model, x, _ = build("convolutions")
    model, x = model.float(), x.float()
    graph = trace(model, x)
    exact, half = InsensitivityDecay(copy.deepcopy(model), graph, 0.1, mode), InsensitivityDecay(model, graph, 0.1, mode)
    with exact.watching():
        exact._sensitivities.model(x)
    with half.watching(), torch.autocast("cpu", torch.bfloat16):
        model(x)
    expected = exact.step()
    for group, sensitivity in half.step().items():
        torch.testing.assert_close(sensitivity, expected[group], rtol=0.05, atol=1e-3)
    assert all(p.dtype == torch.float32 for p in model.parameters())


@pytest.mark.parametrize("n", range(8))
def test_bisection_finds_the_largest_threshold_that_is_accepted(n):
    thresholds = [0.5 * i for i in range(n)]
    for limit in (-1.0, *thresholds):
        asked = []

        def accepts(threshold, limit=limit, asked=asked):
            asked.append(threshold)
            return threshold <= limit

        expected = max((t for t in thresholds if t <= limit), default=None)
        assert largest_accepted(thresholds, accepts) == expected
        assert len(asked) == len(set(asked)) <= (n + 1 - 1).bit_length()


def test_what_a_stage_may_cost():
    assert tolerated(1.0, 1.0, 0.0)
    assert not tolerated(1.0 + 1e-9, 1.0, 0.0)
    assert tolerated(1.05, 1.0, 0.05)
    assert tolerated(-0.95, -1.0, 0.05)
    assert not tolerated(-0.9, -1.0, 0.05)
    assert not tolerated(float("nan"), 1.0, 10.0)


def test_bad_arguments():
    model, x, _ = build("mlp")
    graph = trace(model, x)
    with pytest.raises(ConfigError, match="sensitivity='half' is not known; choose one of full, lower_bound, local"):
        InsensitivityDecay(model, graph, mode="half")
    for lam in (-0.1, 1.5, float("nan")):
        with pytest.raises(ConfigError, match=r"decay=.* must lie in \[0, 1\]"):
            InsensitivityDecay(model, graph, lam)
    with pytest.raises(ConfigError, match="Linear has no group whose units"):
        InsensitivityDecay(nn.Linear(6, 3).double(), trace(nn.Linear(6, 3).double(), x))
