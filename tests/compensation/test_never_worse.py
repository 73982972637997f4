"""No consumer is left with a larger error than plain cutting leaves it with: every kind of layer, every way to compensate."""

import logging

import pytest
import torch
from torch import nn

from actprune.compensation import Layer, LeastSquares, Mean

C = 5
GONE = torch.tensor([False, True, False, True, False])
LAYERS = {
    "linear": (lambda: nn.Linear(C, 4), ()),
    "linear on tokens": (lambda: nn.Linear(C, 4, bias=False), (7,)),
    "pointwise": (lambda: nn.Conv2d(C, 4, 1, stride=2), (6, 7)),
    "3x3": (lambda: nn.Conv2d(C, 4, 3), (6, 5)),
    "padded": (lambda: nn.Conv2d(C, 4, 3, padding=1, bias=False), (6, 5)),
    "padded, two by two": (lambda: nn.Conv2d(C, 4, 3, padding=1), (2, 2)),
    "padded, one pixel": (lambda: nn.Conv2d(C, 4, 3, padding=1), (1, 1)),
    "padded, dilated": (lambda: nn.Conv2d(C, 4, 3, padding=4, dilation=4, stride=2), (5, 6)),
    "padded, 1-d": (lambda: nn.Conv1d(C, 4, 5, padding=2), (2,)),
    "circular": (lambda: nn.Conv2d(C, 4, 3, padding=1, padding_mode="circular"), (2, 3)),
}
WAYS = {
    "patches": LeastSquares(positions=10**6),
    "channels": LeastSquares(positions=10**6, memory=8 * C**2),
    "mean": LeastSquares(memory=0),
    "mean alone": Mean(),
}


def built(name, seed, offset):
    make, space = LAYERS[name]
    torch.manual_seed(seed)
    module = make().double()
    x = torch.einsum("nc...,dc->nd...", torch.randn(60, C, *space), torch.randn(C, C)) + offset * torch.randn(C).view(
        C, *[1] * len(space)
    )
    return Layer(name, module, module.weight, 1), x.double()


def run(module, x, weight, bias):
    if isinstance(module, nn.Linear):
        return torch.nn.functional.linear(x.movedim(1, -1), weight, bias)
    return module._conv_forward(x, weight, bias)


def errors(layer, x, how):
    """Mean square errors against the layer as it was: as cut, compensated."""
    statistic = how.statistic(layer, C)
    layer.space = tuple(x.shape[2:])
    how.observe(statistic, layer, x, torch.arange(len(x)))
    fold = how.fold(layer, statistic, GONE)
    module = layer.module
    before = run(module, x, module.weight, None)
    plain = module.weight.detach().clone()
    plain[:, GONE] = 0
    folded = plain.clone()
    if fold.weight is not None:
        folded[:, ~GONE] += fold.weight[:, ~GONE]
    after = [run(module, x, plain, None), run(module, x, folded, fold.bias)]
    return [float((before - y).detach().square().mean()) for y in after]


@pytest.mark.parametrize("offset", [0.0, 3.0])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", LAYERS)
def test_no_larger_error_than_plain_cutting(name, way, offset):
    """Means of channels are taken over whole maps, a strided or unpadded layer reads a part of them: they differ by noise."""
    same = way == "patches" or name.startswith(("linear", "circular"))
    for seed in range(5):
        plain, compensated = errors(*built(name, seed, offset), WAYS[way])
        assert compensated <= plain * (1 + (1e-9 if same else 1e-2))


@pytest.mark.parametrize("way", ["patches", "channels"])
@pytest.mark.parametrize("name", LAYERS)
def test_where_nothing_can_be_added_the_refit_does_without(name, way):
    how, same = WAYS[way], way == "patches" or name.startswith(("linear", "circular"))
    for seed in range(5):
        layer, x = built(name, seed, 3.0)
        layer.intercept = False
        plain, compensated = errors(layer, x, how)
        assert compensated <= plain * (1 + (1e-9 if same else 1e-2))
    statistic = how.statistic(layer, C)
    how.observe(statistic, layer, x, torch.arange(len(x)))
    assert not how.fold(layer, statistic, GONE).bias.any()


def test_maps_that_are_mostly_border_take_the_mean_of_what_was_really_read(caplog):
    """One pixel: eight of nine taps meet zeros, so the sum over all taps would be far off."""
    layer, x = built("padded, one pixel", 0, 3.0)
    with caplog.at_level(logging.WARNING):
        plain, compensated = errors(layer, x, Mean())
    assert "padded, one pixel: maps of (1, 1) are mostly border" in caplog.text
    centre = layer.module.weight.detach()[:, :, 1, 1]
    removed = x[:, GONE, 0, 0] @ centre[:, GONE].T
    assert compensated == pytest.approx(float(removed.var(0, correction=0).mean()), rel=1e-9)
    assert compensated < plain


def test_larger_maps_stay_exact_inside_and_nothing_is_said(caplog):
    layer, x = built("padded", 0, 3.0)
    x[:, GONE] = torch.tensor([1.5, -2.0], dtype=torch.float64).view(1, 2, 1, 1)
    with caplog.at_level(logging.WARNING):
        statistic = Mean().statistic(layer, C)
        layer.space = tuple(x.shape[2:])
        Mean().observe(statistic, layer, x, torch.arange(len(x)))
        bias = Mean().fold(layer, statistic, GONE).bias
    expected = layer.module.weight.detach()[:, GONE].sum((2, 3)) @ torch.tensor([1.5, -2.0], dtype=torch.float64)
    torch.testing.assert_close(bias, expected)
    assert not caplog.records


def test_transposed_convolutions_say_that_channels_alone_are_read(caplog):
    module = nn.ConvTranspose2d(C, 4, 3, stride=2)
    with caplog.at_level(logging.WARNING):
        statistic = LeastSquares().statistic(Layer("up", module, module.weight, 0), C)
    assert statistic.n_units == C
    assert "up: ConvTranspose2d: channels only" in caplog.text
