"""Least squares compensation against float64 lstsq on explicit patch matrices."""

import logging
import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import actprune
from actprune import Budget, Pruner, criteria
from actprune.compensation import Layer, LeastSquares, Mean
from actprune.compensation.least_squares import excess, prediction
from actprune.compensation.solve import ridge_solve
from actprune.core.errors import ConfigError, ObservationError
from actprune.core.views import Criterion
from actprune.pruning.plans import compensated, draft
from actprune.statistics import Gram, Moments

ALL = 10**6  # positions per sample: every one
C = 5
GONE = torch.tensor([False, True, False, True, False])

LAYERS = {
    "linear": (lambda: nn.Linear(C, 4), (C,)),
    "linear on tokens": (lambda: nn.Linear(C, 4, bias=False), (C, 7)),
    "pointwise, stride": (lambda: nn.Conv2d(C, 4, 1, stride=2), (C, 6, 7)),
    "3x3": (lambda: nn.Conv2d(C, 4, 3), (C, 6, 5)),
    "zero padding": (lambda: nn.Conv2d(C, 4, 3, padding=1, bias=False), (C, 6, 5)),
    "same": (lambda: nn.Conv2d(C, 4, (1, 3), padding="same"), (C, 6, 5)),
    "stride and dilation": (lambda: nn.Conv2d(C, 4, (3, 2), stride=(2, 1), dilation=(1, 2), padding=(2, 1)), (C, 8, 7)),
    "circular": (lambda: nn.Conv2d(C, 4, 3, padding=(1, 2), padding_mode="circular"), (C, 5, 6)),
    "reflect": (lambda: nn.Conv2d(C, 4, 3, padding=1, padding_mode="reflect"), (C, 5, 6)),
    "1-d": (lambda: nn.Conv1d(C, 4, 3, stride=2, padding=1), (C, 11)),
    "3-d": (lambda: nn.Conv3d(C, 4, (1, 2, 2), padding=(0, 1, 0)), (C, 2, 4, 3)),
}
each_layer = pytest.mark.parametrize("name", LAYERS)


def built(name, n=40):
    make, shape = LAYERS[name]
    torch.manual_seed(3)
    module = make()
    x = torch.randn(n, *shape)
    mixing = torch.randn(C, C)
    x = torch.einsum("nc...,dc->nd...", x, mixing) + torch.arange(C).view(-1, *[1] * (len(shape) - 1))
    return Layer(name, module, module.weight, 1), x


def observed(how, layer, x, splits=3):
    statistic = how.statistic(layer, C)
    ids = torch.arange(len(x))
    for part, numbers in zip(x.tensor_split(splits), ids.tensor_split(splits), strict=True):
        how.observe(statistic, layer, part, numbers)
    return statistic


def explicit_patches(module, x):
    """(R, C * taps) by convolving with one-hot kernels, float64: no code in common with the product."""
    x = x.double()
    if isinstance(module, nn.Linear):
        return (x if x.dim() == 2 else x.movedim(1, -1).flatten(0, -2)).numpy()
    width = module.weight[0].numel()
    eye = torch.eye(width, dtype=torch.float64).view(width, *module.weight.shape[1:])
    patches = module._conv_forward(x, eye, None)
    return patches.movedim(1, -1).flatten(0, -2).numpy()


def reference(weight, patches, leaves, ridge):
    """Minimise |X W - X_K W' - b'|^2 / n + lambda |W' - W_K|^2 as one augmented lstsq; weights (out, d)."""
    mean = patches.mean(0)
    centred = patches - mean
    damping = ridge * np.square(centred[:, ~leaves]).mean()
    kept = centred[:, ~leaves]
    rows = np.vstack([kept, math.sqrt(len(kept) * damping) * np.eye(kept.shape[1])])
    target = np.vstack([centred @ weight.T, math.sqrt(len(kept) * damping) * weight[:, ~leaves].T])
    refitted = np.linalg.lstsq(rows, target, rcond=None)[0].T
    return refitted, weight @ mean - refitted @ mean[~leaves]


def refitted(layer, fold):
    """(out, kept width) weights after the fold, and the bias."""
    taps = layer.weight[0, 0].numel() if layer.weight.dim() > 2 else 1
    leaves = GONE.repeat_interleave(taps).numpy()
    new = (layer.weight.detach().double() + fold.weight).flatten(1).numpy()
    return new[:, ~leaves], fold.bias.numpy(), leaves


@each_layer
@pytest.mark.parametrize("ridge", [1e-6, 1e-3, 1.0])
def test_fold_is_lstsq_on_explicit_patches(name, ridge):
    layer, x = built(name)
    how = LeastSquares(ridge=ridge, positions=ALL)
    statistic = observed(how, layer, x)
    assert isinstance(statistic, Gram)
    weight, bias, leaves = refitted(layer, how.fold(layer, statistic, GONE))
    patches = explicit_patches(layer.module, x)
    expected_weight, expected_bias = reference(layer.weight.detach().double().flatten(1).numpy(), patches, leaves, ridge)
    np.testing.assert_allclose(weight, expected_weight, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(bias, expected_bias, rtol=1e-4, atol=1e-5)


@each_layer
def test_the_refit_is_never_worse_than_the_mean_and_far_better_on_what_is_predictable(name):
    layer, x = built(name)
    x[:, 1] = 0.5 * x[:, 0] - x[:, 2] + 0.1 * torch.randn_like(x[:, 1])
    x[:, 3] = x[:, 4] + 0.1 * torch.randn_like(x[:, 3]) - 2
    patches = explicit_patches(layer.module, x)
    whole = patches @ layer.weight.detach().double().flatten(1).numpy().T

    def error(how):
        fold = how.fold(layer, observed(how, layer, x), GONE)
        shift = fold.weight if fold.weight is not None else torch.zeros_like(layer.weight).double()
        weight, bias, leaves = refitted(layer, type(fold)(fold.bias, shift))
        return np.square(whole - patches[:, ~leaves] @ weight.T - bias).sum(1).mean()

    assert error(LeastSquares(positions=ALL)) < 0.1 * error(Mean())
    assert error(LeastSquares(ridge=1e6, positions=ALL)) <= error(Mean()) * (1 + 1e-9)


def test_sampled_positions_are_patches_of_those_positions():
    """Constant maps: every position without padding has the same patch, so any sample gives the same moments."""
    layer, x = built("3x3")
    x = x[:, :, :1, :1].expand_as(x).contiguous()
    few, every = (observed(LeastSquares(positions=k), layer, x).compute() for k in (2, ALL))
    torch.testing.assert_close(few, every, rtol=1e-9, atol=1e-9)


def test_batches_and_their_order_do_not_matter():
    layer, x = built("stride and dilation")
    how = LeastSquares(positions=4)
    whole, parts = observed(how, layer, x, 1).compute(), observed(how, layer, x, 7).compute()
    torch.testing.assert_close(parts, whole, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("n", [1, 2])
@each_layer
def test_few_samples_give_a_finite_fold(name, n):
    layer, x = built(name, n)
    how = LeastSquares(positions=1)
    fold = how.fold(layer, observed(how, layer, x, 1), GONE)
    assert fold.weight.isfinite().all()
    assert fold.bias.isfinite().all()


def test_one_sample_of_a_linear_layer_is_the_mean():
    layer, x = built("linear", 1)
    how = LeastSquares()
    fold = how.fold(layer, observed(how, layer, x, 1), GONE)
    mean = Mean()
    expected = mean.fold(layer, observed(mean, layer, x, 1), GONE)
    assert not fold.weight.any()
    torch.testing.assert_close(fold.bias, expected.bias)


# --- where the covariance of patches does not fit ---


def test_beyond_the_memory_limit_channels_then_means_are_observed_and_it_is_said(caplog):
    layer, x = built("3x3")
    with caplog.at_level(logging.WARNING):
        assert isinstance(LeastSquares(memory=8 * 45**2).statistic(layer, C), Gram)
        assert not caplog.records
        channels = LeastSquares(memory=8 * 45**2 - 1)
        assert channels.statistic(layer, C).n_units == C
        assert "3x3: a covariance of 5 channels x 9 taps needs 16200 bytes, memory=16199: channels only" in caplog.text
        means = LeastSquares(memory=100)
        statistic = observed(means, layer, x)
        assert isinstance(statistic, Moments)
        assert "3x3: a covariance of 5 channels needs 200 bytes, memory=100: the mean is folded instead" in caplog.text
    torch.testing.assert_close(
        means.fold(layer, statistic, GONE).bias, Mean().fold(layer, observed(Mean(), layer, x), GONE).bias
    )


@pytest.mark.parametrize("module", [nn.Conv2d(C, 4, 3), nn.ConvTranspose2d(C, 4, 2, stride=2)], ids=["memory", "transposed"])
def test_channels_alone_replace_a_combination_of_others_exactly(module):
    torch.manual_seed(0)
    x = torch.randn(30, C, 5, 5)
    transposed = isinstance(module, nn.ConvTranspose2d)
    # a constant adds the same to all outputs of a convolution, and not to those of a transposed one
    x[:, 1], x[:, 3] = 0.5 * x[:, 0] + x[:, 2], 2 * x[:, 4] - (0 if transposed else 3)
    if transposed:
        x -= x.mean((0, 2, 3), keepdim=True)
    layer = Layer("layer", module, module.weight, 0 if transposed else 1)
    how = LeastSquares(ridge=1e-12, positions=ALL, memory=8 * C**2)
    fold = how.fold(layer, observed(how, layer, x), GONE)
    before = module(x).double()
    with torch.no_grad():
        weight = module.weight.double() + fold.weight
        weight[(GONE, slice(None)) if transposed else (slice(None), GONE)] = 0
        run = F.conv_transpose2d if transposed else F.conv2d
        after = run(x.double(), weight, module.bias.double() + fold.bias, stride=module.stride)
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-4)


def test_a_weight_that_is_used_twice_gets_the_mean_and_it_is_said(caplog):
    module = nn.Linear(C, 4)
    with caplog.at_level(logging.WARNING):
        assert isinstance(LeastSquares().statistic(Layer("fc", module, module.weight, 1, runs=2), C), Moments)
    assert "fc: its weight is used 2 times: the mean is folded instead" in caplog.text


# --- through surgery ---


class First(Criterion):
    def score(self, view):
        return torch.arange(view.size, dtype=torch.float64)


def cut_first(model, x, n, how, group=0):
    pruner = Pruner(model, x[:1], First(), Budget(params=0.999), compensation=how)
    model.eval()
    with pruner.observe() as observation, torch.no_grad():
        observation.begin_batch(torch.arange(len(x)))
        model(x)
    units = {pruner.graph.unlocked[group].name: list(range(n))}
    plan = compensated(draft(model, pruner.graph, units), model, pruner.graph, units, observation, how)
    pruner.execute(plan)
    return pruner


def copies(layer, n):
    """The first n units become weighted copies of the next n, before a ReLU."""
    with torch.no_grad():
        for tensor in (layer.weight, layer.bias):
            tensor[:n] = tensor[n : 2 * n] * torch.linspace(0.5, 2, n).view(-1, *[1] * (tensor.dim() - 1))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("padding", [0, 1])
def test_units_that_repeat_others_leave_without_a_trace(bias, padding):
    torch.manual_seed(1)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(8, 6, 3, padding=padding, bias=bias),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(6 * (4 + 2 * padding) ** 2, 4),
    )
    copies(model[0], 3)
    x = torch.randn(60, 3, 6, 6)
    model.eval()
    before = model(x).detach()
    cut_first(model, x, 3, LeastSquares(ridge=1e-10, positions=ALL))
    assert model[2].in_channels == 5
    torch.testing.assert_close(model(x), before, rtol=1e-4, atol=1e-4)


def test_a_constant_behind_zero_padding_is_replaced_by_another_constant_border_and_all():
    torch.manual_seed(1)
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.Sigmoid(), nn.Conv2d(8, 4, 3, padding=1), nn.Flatten())
    with torch.no_grad():
        model[0].weight[:2] = 0
    x = torch.randn(20, 3, 6, 6)
    before = model(x).detach()
    cut_first(model, x, 1, LeastSquares(ridge=1e-10, positions=ALL))
    torch.testing.assert_close(model(x), before, rtol=1e-5, atol=1e-5)


def test_a_layer_norm_before_the_consumer_and_a_concatenation():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(6, 8), nn.Linear(6, 5)
            self.end = nn.Linear(13, 3)

        def forward(self, x):
            return self.end(torch.cat([self.a(x).relu(), self.b(x).relu()], dim=-1))

    torch.manual_seed(0)
    model = Net()
    copies(model.a, 3)
    x = torch.randn(50, 4, 6)
    before = model(x).detach()
    cut_first(model, x, 3, LeastSquares(ridge=1e-10, positions=ALL))
    assert model.end.in_features == 10
    torch.testing.assert_close(model(x), before, rtol=1e-5, atol=1e-5)


def test_prune_folds_weights_and_keeps_more_than_plain_cutting():
    torch.manual_seed(0)
    x = torch.randn(200, 12) @ torch.randn(12, 12)
    errors = {}
    for name, how in {"plain": None, "mean": Mean(), "refit": LeastSquares(refit="once")}.items():
        torch.manual_seed(1)
        model = nn.Sequential(nn.Linear(12, 32), nn.ReLU(), nn.Linear(32, 4))
        before = model(x).detach()
        actprune.prune(model, x[:1], [x], criterion=criteria.Random(), budget=Budget(params=0.6), compensation=how)
        errors[name] = float((model(x) - before).detach().square().mean())
    assert errors["refit"] < 0.5 * errors["mean"] < errors["plain"]


# --- the solver ---


def test_ridge_solve_is_numpy():
    generator = np.random.default_rng(0)
    a = generator.normal(size=(20, 6))
    gram, right = a.T @ a, generator.normal(size=(6, 3))
    expected = np.linalg.solve(gram + 0.01 * np.trace(gram) / 6 * np.eye(6), right)
    actual = ridge_solve(torch.from_numpy(gram), torch.from_numpy(right), 0.01)
    np.testing.assert_allclose(actual.numpy(), expected, rtol=1e-10)


def test_a_singular_matrix_gets_the_jitter_it_needs():
    one = torch.ones(4, 4, dtype=torch.float64)
    solution = ridge_solve(one, torch.ones(4, 1, dtype=torch.float64), 0.0)
    torch.testing.assert_close(one @ solution, torch.ones(4, 1, dtype=torch.float64), rtol=1e-6, atol=1e-6)


def test_a_matrix_that_is_slightly_indefinite_is_solved_and_a_hopeless_one_raises():
    gram = torch.diag(torch.tensor([1.0, 1.0, -1e-9], dtype=torch.float64))
    assert ridge_solve(gram, torch.ones(3, 1), 0.0).isfinite().all()
    with pytest.raises(ObservationError, match="no ridge up to 1e-01 of the mean variance"):
        ridge_solve(torch.diag(torch.tensor([9.0, -4.0])), torch.ones(2, 1), 0.0)
    with pytest.raises(ObservationError, match="second moments are not finite"):
        ridge_solve(torch.full((2, 2), math.nan), torch.ones(2, 1), 0.1)


def test_nothing_that_varies_explains_nothing():
    assert not ridge_solve(torch.zeros(3, 3), torch.ones(3, 2), 1e-3).any()


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("ridge", [0.0, 1e-3, 10.0])
def test_excess_is_the_error_by_hand_and_never_positive(seed, ridge):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(50, 6, generator=generator, dtype=torch.float64) @ torch.randn(6, 6, generator=generator).double()
    x = x - x.mean(0)
    gone = torch.tensor([True, False, False, True, False, False])
    removed = torch.randn(3, 2, generator=generator, dtype=torch.float64)
    delta = removed @ prediction(x.T @ x / 50, gone, ridge)
    said = x[:, gone] @ removed.T
    by_hand = (said - x[:, ~gone] @ delta.T).square().sum() / 50 - said.square().sum() / 50
    actual = excess(removed, delta, x.T @ x / 50, gone)
    torch.testing.assert_close(actual, by_hand)
    assert actual <= 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ridge": -1}, "ridge=-1 must be"),
        ({"ridge": math.inf}, "ridge=inf must be"),
        ({"positions": 0}, "positions=0 must be"),
        ({"memory": -1}, "memory=-1 must be"),
        ({"refit": "twice"}, "refit='twice' is not known; choose one of sequential, once"),
    ],
)
def test_settings_are_checked(options, message):
    with pytest.raises(ConfigError, match=message):
        LeastSquares(**options)
