"""Sequential refit against lstsq on what each layer reads in the network that was cut."""

import copy
import logging

import numpy as np
import pytest
import torch
from torch import nn

import actprune
from actprune import Budget, Pruner, criteria
from actprune.compensation import LeastSquares, Mean
from actprune.core.views import Criterion
from actprune.pruning.finishing import bytes_per_sample, has_finish, holding, together
from actprune.pruning.sequential import refit

ALL = LeastSquares(ridge=1e-9, positions=10**6)


class First(Criterion):
    """The first units of every group are the worst."""

    def score(self, view):
        return torch.arange(view.size, dtype=torch.float64)


def cut(model, x, share=0.6):
    """Cut plainly; returns the original, the graph and the plan."""
    original = copy.deepcopy(model)
    pruner = Pruner(model, x[:1], First(), Budget(params=share), compensation=None)
    plan = pruner.plan(None)
    pruner.execute(plan)
    return original, pruner.graph, plan


def lstsq(x, y):
    """Weights (out, d) and bias of the best affine map, float64."""
    x = x.detach().double().numpy().reshape(-1, x.shape[-1])
    y = y.detach().double().numpy().reshape(len(x), -1)
    solution = np.linalg.lstsq(np.column_stack([x, np.ones(len(x))]), y, rcond=None)[0]
    return solution[:-1].T, solution[-1]


def assert_layer(layer, expected):
    np.testing.assert_allclose(layer.weight.detach().flatten(1).numpy(), expected[0], rtol=2e-3, atol=2e-4)
    np.testing.assert_allclose(layer.bias.detach().numpy(), expected[1], rtol=2e-3, atol=2e-4)


def correlated(n, *shape, seed=0):
    torch.manual_seed(seed)
    return torch.randn(n, shape[0]) @ torch.randn(*shape)


def chain():
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 12), nn.Tanh(), nn.Linear(12, 3))


def test_a_chain_is_refitted_front_to_back_to_its_own_outputs():
    x = correlated(500, 6, 6)
    model = chain()
    original, graph, plan = cut(model, x)
    result = refit(model, original, graph, plan, x, ALL)
    kept = [original[i].weight.shape[0] - len(plan.removed.get(f"{i}.weight", {}).get(0, [])) for i in (0, 2)]
    assert kept == [model[0].out_features, model[2].out_features]
    assert min(kept) < 12
    hidden, target = model[:2](x), original[:3](x)[:, -kept[1] :]
    assert_layer(model[2], lstsq(hidden, target))
    assert_layer(model[4], lstsq(model[:4](x), original(x)))
    assert list(result.layers) == ["0", "2", "4"]
    assert result.n_samples == 500
    before, after = result.layers["4"]
    assert after < before
    expected = (original(x) - model(x)).detach().double().square().sum(1).mean()
    assert after == pytest.approx(float(expected), rel=1e-2)


class Residual(nn.Module):
    """Two residual branches; the sum is written in the way that ``style`` says."""

    def __init__(self, style="out of place"):
        super().__init__()
        torch.manual_seed(2)
        self.style = style
        self.stem = nn.Linear(6, 8)
        self.branches = nn.ModuleList(nn.Sequential(nn.Linear(8, 14), nn.Tanh(), nn.Linear(14, 8)) for _ in range(2))
        self.end = nn.Linear(8, 3)

    def stream(self, x, n=2):
        x = self.stem(x).sin()
        for branch in self.branches[:n]:
            out = branch(x)
            if self.style == "in place":
                out += x
            elif self.style == "reversed":
                out = x + out
            elif self.style == "into the stream":
                x = x.clone()
                x += out
                out = x
            else:
                out = out + x
            x = out
        return x

    def forward(self, x):
        return self.end(self.stream(x))


def narrow_hidden(model, x, n=6):
    """Remove the first units of both hidden layers, not of the stream."""
    from actprune.pruning.plans import draft

    original = copy.deepcopy(model)
    pruner = Pruner(model, x[:1], First(), Budget(params=0.99), compensation=None)
    plan = draft(model, pruner.graph, {f"branches.{i}.0": range(n) for i in range(2)})
    pruner.execute(plan)
    return original, pruner.graph, plan


@pytest.mark.parametrize("style", ["out of place", "in place", "reversed", "into the stream"])
def test_a_branch_is_refitted_to_what_its_stream_should_be(style):
    x = correlated(600, 6, 6)
    model = Residual(style)
    original, graph, plan = narrow_hidden(model, x)
    refit(model, original, graph, plan, x, ALL)
    before = model.stream(x, 1)
    hidden = model.branches[1][:2](before)
    assert_layer(model.branches[1][2], lstsq(hidden, original.stream(x) - before))
    assert_layer(model.end, lstsq(model.stream(x), original(x)))


class Stream(nn.Module):
    """A layer whose output goes into a sum, and elsewhere: first into the branch, whose scale keeps it from being refitted."""

    def __init__(self, later):
        super().__init__()
        torch.manual_seed(2)
        self.later = later
        self.stem, self.inner, self.outer = nn.Linear(6, 8), nn.Linear(8, 14), nn.Linear(14, 8)
        self.scale, self.end = nn.Parameter(torch.rand(8) + 0.5), nn.Linear(8, 3)

    def stream(self, x):
        y = self.stem(x)
        branch = self.scale * self.outer(self.inner(x.repeat(1, 2)[:, :8] if self.later else y).tanh())
        return y + branch if not self.later else (y + branch).tanh() * y

    def forward(self, x):
        return self.end(self.stream(x))


@pytest.mark.parametrize("later", [False, True])
def test_what_something_else_reads_too_is_refitted_to_its_own_output(later):
    from actprune.pruning.plans import draft

    x = correlated(600, 6, 6)
    model = Stream(later)
    original = copy.deepcopy(model)
    pruner = Pruner(model, x[:1], First(), Budget(params=0.99), compensation=None)
    plan = draft(model, pruner.graph, {"inner": range(6)})
    pruner.execute(plan)
    refit(model, original, pruner.graph, plan, x, ALL)
    torch.testing.assert_close(model.stem(x), original.stem(x))
    assert_layer(model.end, lstsq(model.stream(x), original(x)))


def test_an_activation_in_place_before_the_sum_is_not_mistaken_for_the_layer():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(2)
            self.a, self.b, self.end = nn.Linear(6, 12), nn.Linear(12, 6), nn.Linear(6, 2)

        def forward(self, x):
            out = self.b(self.a(x).tanh())
            out.tanh_()
            return self.end(out + x)

    x = correlated(400, 6, 6)
    model = Net()
    original, graph, plan = cut(model, x, 0.7)
    refit(model, original, graph, plan, x, ALL)
    assert_layer(model.b, lstsq(model.a(x).tanh(), original.b(original.a(x).tanh())))


class Block(nn.Module):
    """A residual block of a convolutional network, with a projection that is computed last or first."""

    def __init__(self, last=True):
        super().__init__()
        self.last = last
        self.conv1, self.bn1 = nn.Conv2d(4, 10, 3, padding=1, bias=False), nn.BatchNorm2d(10)
        self.conv2, self.bn2 = nn.Conv2d(10, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6)
        self.down, self.bn3 = nn.Conv2d(4, 6, 1, bias=False), nn.BatchNorm2d(6)
        self.end = nn.Conv2d(6, 2, 1)

    def branch(self, x):
        return self.bn2(self.conv2(self.hidden(x)))

    def hidden(self, x):
        return self.bn1(self.conv1(x)).relu()

    def joined(self, x):
        if self.last:
            out = self.branch(x)
            return out + self.bn3(self.down(x))
        short = self.bn3(self.down(x))
        return self.branch(x) + short

    def forward(self, x):
        return self.end(self.joined(x).relu())


@pytest.mark.parametrize("last", [True, False])
def test_behind_a_batch_norm_the_fit_is_in_units_before_it_and_the_intercept_goes_into_its_mean(last):
    torch.manual_seed(0)
    model = Block(last)
    x = torch.einsum("nchw,dc->ndhw", torch.randn(200, 4, 5, 5), torch.randn(4, 4))
    with torch.no_grad():
        for norm in (model.bn1, model.bn2, model.bn3):
            norm.running_mean.normal_()
            norm.running_var.uniform_(0.5, 2)
            norm.weight.normal_()
            norm.bias.normal_()
    model.eval()
    original, graph, plan = narrow(model, x, {"conv1": range(4)})
    refit(model, original, graph, plan, x, ALL)
    model.eval()
    scale = model.bn2.weight * (model.bn2.running_var + model.bn2.eps).rsqrt()
    rest = model.bn3(model.down(x)) + (model.bn2.bias - original.bn2.running_mean * scale)[:, None, None]
    target = (original.joined(x) - rest) / scale[:, None, None]
    patches = torch.nn.functional.unfold(model.hidden(x), 3, padding=1).movedim(1, -1)
    weight, bias = lstsq(patches, target.flatten(2).movedim(1, -1))
    np.testing.assert_allclose(model.conv2.weight.detach().flatten(1).numpy(), weight, rtol=2e-3, atol=1e-3)
    shift = original.bn2.running_mean - model.bn2.running_mean
    np.testing.assert_allclose(shift.numpy(), bias, rtol=2e-3, atol=1e-3)


def narrow(model, x, units):
    from actprune.pruning.plans import draft

    original = copy.deepcopy(model)
    pruner = Pruner(model, x[:1], First(), Budget(params=0.999), compensation=None)
    plan = draft(model, pruner.graph, units)
    pruner.execute(plan)
    return original, pruner.graph, plan


def test_hooks_and_modes_are_as_they_were_even_after_a_failure():
    x = correlated(100, 6, 6)
    model = chain()
    model[1].train()
    model[0].eval()
    original, graph, plan = cut(model, x)
    modes = [m.training for m in model.modules()]
    refit(model, original, graph, plan, x, ALL)
    with pytest.raises(RuntimeError):
        refit(model, original, graph, plan, torch.zeros(2, 5), ALL)
    assert [m.training for m in model.modules()] == modes
    assert not any(m._forward_hooks or m._forward_pre_hooks for net in (model, original) for m in net.modules())


def test_a_layer_that_runs_twice_is_left_alone():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.a, self.b, self.end = nn.Linear(6, 9), nn.Linear(9, 9), nn.Linear(9, 2)

        def forward(self, x):
            return self.end(self.b(self.b(self.a(x).tanh()).tanh()).tanh())

    x = correlated(100, 6, 6)
    model = Twice()
    original, graph, plan = cut(model, x)
    before = model.b.weight.detach().clone()
    assert list(refit(model, original, graph, plan, x, ALL).layers) == ["a", "end"]
    assert torch.equal(model.b.weight, before)


# --- through prune ---


def test_prune_refits_and_beats_a_single_fold_in_depth():
    torch.manual_seed(0)
    x = torch.randn(800, 10)
    errors = {}
    for how in ("once", "sequential"):
        torch.manual_seed(3)
        layers = [layer for _ in range(5) for layer in (nn.Linear(24, 24), nn.ReLU())]
        model = nn.Sequential(nn.Linear(10, 24), nn.ReLU(), *layers, nn.Linear(24, 4))
        for layer in model[::2]:
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
        before = model(x).detach()
        options = {"criterion": criteria.Variance(), "budget": Budget(params=0.5)}
        actprune.prune(model, x[:1], x.split(200), compensation=LeastSquares(refit=how), **options)
        errors[how] = float((model(x) - before).detach().square().mean())
    assert errors["sequential"] < 0.95 * errors["once"]


def test_prune_keeps_training_mode_and_gradients_possible():
    model = chain().train()
    x = correlated(100, 6, 6)
    actprune.prune(model, x[:1], [x], criterion=criteria.Variance(), budget=Budget(params=0.6), compensation=LeastSquares())
    assert model.training
    model(x).sum().backward()
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize("recalibrates", [True, False])
def test_recalibration_follows_the_setting(recalibrates):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 16, 2))
    x = torch.randn(40, 3, 6, 6) + 1
    how = LeastSquares(recalibrate=recalibrates)
    actprune.prune(model, x[:1], [x], criterion=criteria.Variance(), budget=Budget(params=0.6), compensation=how)
    assert bool((model[1].running_mean != 0).all()) == recalibrates


@pytest.mark.parametrize(
    ("how", "expected"),
    [
        (LeastSquares(), True),
        (LeastSquares(refit="once"), True),
        (LeastSquares(refit="once", recalibrate=False), False),
        (None, False),
    ],
)
def test_who_needs_the_data_again(how, expected):
    assert has_finish(how) is expected


# --- batches ---


def test_batches_are_joined_up_to_the_memory_limit_and_it_is_said(caplog):
    model = chain()
    x = torch.randn(10, 6)
    assert bytes_per_sample(model, x) == 16 * 4
    assert torch.equal(together(model, x.split(4), 10 * 64), x)
    assert not caplog.records
    with caplog.at_level(logging.WARNING):
        assert torch.equal(together(model, x.split(4), 7 * 64), x[:7])
    assert "takes the first 7 samples: more need over 448 bytes" in caplog.text


@pytest.mark.parametrize(
    ("how", "expected"),
    [
        (LeastSquares(memory=7 * 64), 2),  # seven samples are taken; the second batch of four holds the last of them
        (LeastSquares(), 5),
        (LeastSquares(memory=7 * 64, recalibrate=True), 5),
        (LeastSquares(refit="once", recalibrate=False), 0),
        (Mean(), 0),
    ],
)
def test_no_more_of_the_data_is_held_than_is_needed_afterwards(how, expected):
    model, x = chain(), torch.randn(20, 6)
    pairs, inputs = holding(((part, None) for part in x.split(4)), model, how, x[:2])
    assert torch.equal(torch.cat([part for part, _ in pairs]), x)
    assert len(inputs) == expected


def test_prune_refits_by_default_and_needs_no_data_to_cut_plainly():
    x = correlated(200, 6, 6)
    options = {"criterion": criteria.Magnitude(), "budget": Budget(params=0.6)}
    models = [chain() for _ in range(3)]
    actprune.prune(models[0], x[:1], [x], **options)
    actprune.prune(models[1], x[:1], [x], compensation=LeastSquares(), **options)
    assert all(torch.equal(a, b) for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True))
    actprune.prune(models[2], x[:1], **options)
    assert torch.equal(models[2][4].bias, chain()[4].bias)


def test_tuples_and_dicts_of_tensors_are_joined_and_other_batches_refused():
    class Two(nn.Module):
        def forward(self, a, b):
            return a + b

    a, b = torch.randn(6, 3), torch.randn(6, 3)
    pairs = list(zip(a.split(2), b.split(2), strict=True))
    joined = together(Two(), pairs, 10**6)
    assert torch.equal(joined[0], a)
    assert torch.equal(joined[1], b)
    named = together(Two(), [{"a": p, "b": q} for p, q in pairs], 10**6)
    assert torch.equal(named["b"], b)
    assert together(Two(), [(a, 3)], 10**6) is None
    assert together(Two(), [[a]], 10**6) is None
    assert together(Two(), [(a, b[:2])], 10**6) is None
