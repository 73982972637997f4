"""Projections against scipy and the conditions that only the nearest point satisfies."""

import numpy as np
import pytest
import torch
from scipy.optimize import brentq, minimize
from torch import nn

from actprune.capacity import clip, constrain, dykstra, group_norm, linear_map, lipschitz_constant, onto_group_ball, scaled
from actprune.core.errors import ConfigError

CIRCULAR = {"padding": 1, "padding_mode": "circular"}
LAYERS = {
    "linear": (lambda: nn.Linear(5, 4), (5,)),
    "1 x 1": (lambda: nn.Conv2d(4, 6, 1, stride=2, groups=2), (4, 5, 5)),
    "circular": (lambda: nn.Conv2d(3, 4, 3, **CIRCULAR), (3, 5, 6)),
    "circular groups": (lambda: nn.Conv2d(4, 4, 3, padding=2, dilation=2, groups=2, padding_mode="circular"), (4, 5, 6)),
    "zeros": (lambda: nn.Conv2d(3, 4, 3, padding=1), (3, 5, 5)),
    "stride": (lambda: nn.Conv2d(3, 4, 3, stride=2), (3, 7, 7)),
}
NEAREST = ("linear", "1 x 1", "circular", "circular groups")


def layer_of(name):
    torch.manual_seed(0)
    build, shape = LAYERS[name]
    return linear_map(build(), shape, torch.float64)


def inside(layer, found, limit, n=50):
    """Weights on the rim of the limit: in random directions, near ``found``, and from there further out."""
    generator = torch.Generator().manual_seed(1)
    outward = layer.weight - found
    for k in range(n):
        noise = torch.randn(layer.weight.shape, generator=generator, dtype=torch.float64)
        for other in (noise, found + 0.3 * noise * found.std(), found + 10 ** (4 * k / n - 2) * outward):
            yield scaled(layer.with_weight(1e3 * other), limit)


# the (2, 1) ball


@pytest.mark.parametrize("radius", [0.5, 3.0, 11.0])
@pytest.mark.parametrize("shape", [(4, 3), (3, 2, 2, 2), (1, 5), (5, 1)])
def test_the_group_ball_by_root_finding(shape, radius):
    """KKT: every group's norm is lowered by the same threshold, and the radius is attained."""
    torch.manual_seed(0)
    centre = torch.randn(shape, dtype=torch.float64)
    weight = centre + 3 * torch.randn(shape, dtype=torch.float64)
    norms = (weight - centre).norm(dim=1, keepdim=True)
    found = onto_group_ball(weight, centre, radius)
    if norms.sum() <= radius:
        assert found is weight
        return
    threshold = brentq(lambda t: float((norms - t).clamp(min=0).sum()) - radius, 0, float(norms.max()))
    expected = centre + (weight - centre) * (1 - threshold / norms).clamp(min=0)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    assert float(group_norm(found - centre)) == pytest.approx(radius)


def test_the_group_ball_by_brute_force():
    torch.manual_seed(0)
    weight, centre = torch.randn(3, 2, dtype=torch.float64), torch.randn(3, 2, dtype=torch.float64)
    found = onto_group_ball(weight, centre, 1.0)

    def within(flat):
        return 1.0 - float(np.sqrt((flat.reshape(3, 2) - centre.numpy()) ** 2 @ np.ones(2)).sum())

    solved = minimize(
        lambda flat: ((flat - weight.numpy().ravel()) ** 2).sum(),
        centre.numpy().ravel() + 1e-3,
        constraints={"type": "ineq", "fun": within},
        method="SLSQP",
        options={"ftol": 1e-12, "maxiter": 500},
    )
    assert float((found - weight).square().sum()) == pytest.approx(solved.fun, abs=1e-5)


def test_ties_zeros_and_frozen_layers():
    weight = torch.tensor([[3.0, 4.0], [0.0, 5.0], [0.0, 0.0]])
    torch.testing.assert_close(onto_group_ball(weight, torch.zeros(3, 2), 4.0), weight * 0.4)
    assert torch.equal(onto_group_ball(weight, torch.ones(3, 2), 0.0), torch.ones(3, 2))
    one = onto_group_ball(torch.tensor([[2.0]]), torch.tensor([[0.5]]), 0.25)
    assert one.item() == pytest.approx(0.75)


# Lipschitz constants


@pytest.mark.parametrize("share", [0.9, 0.5, 0.1])
@pytest.mark.parametrize("name", LAYERS)
def test_clipping_reaches_the_limit(name, share):
    layer = layer_of(name)
    limit = share * lipschitz_constant(layer)
    clipped = layer.with_weight(clip(layer, limit))
    assert lipschitz_constant(clipped) == pytest.approx(limit, rel=1e-4)
    again = clip(clipped, limit * (1 + 1e-4))
    assert torch.equal(again, clipped.weight)


@pytest.mark.parametrize("name", NEAREST)
def test_the_clipped_weight_is_the_nearest(name):
    """Variational inequality: from the nearest point of a convex set all of the set lies behind a plane."""
    layer = layer_of(name)
    limit = 0.5 * lipschitz_constant(layer)
    found = clip(layer, limit, tolerance=1e-8)
    outward = layer.weight - found
    worst = max(float((outward * (other - found)).sum()) for other in inside(layer, found, limit))
    assert worst <= 1e-4 * float(outward.norm())
    assert float(outward.norm()) < float((layer.weight - scaled(layer, limit)).norm())


def test_clipping_a_matrix_by_its_singular_values():
    layer = layer_of("linear")
    u, values, v = torch.linalg.svd(layer.weight, full_matrices=False)
    torch.testing.assert_close(clip(layer, 0.3), u @ torch.diag(values.clamp(max=0.3)) @ v)


def test_clipping_a_scale():
    norm = nn.BatchNorm1d(3, eps=0)
    norm.weight.data = torch.tensor([-2.0, 0.5, 1.5])
    assert clip(linear_map(norm, (3,)), 1.0).tolist() == [-1.0, 0.5, 1.0]


@pytest.mark.parametrize("name", LAYERS)
def test_zero_weights_and_a_limit_of_zero(name):
    layer = layer_of(name)
    zero = layer.with_weight(torch.zeros_like(layer.weight))
    assert torch.equal(clip(zero, 1.0), zero.weight)
    assert float(clip(layer, 0.0).abs().max()) < 1e-6


@pytest.mark.parametrize("name", LAYERS)
def test_ascent_on_the_ratio_reaches_the_limit(name):
    """No input stretches more than the limit, and gradient ascent finds one that is stretched by it, to two decimals."""
    layer = layer_of(name)
    layer = layer.with_weight(3 * layer.weight)
    limited = layer.with_weight(clip(layer, 0.8))
    x = torch.randn(layer.input_shape, dtype=torch.float64, generator=torch.Generator().manual_seed(3), requires_grad=True)
    optimizer = torch.optim.Adam([x], lr=0.05)
    for _ in range(600):
        optimizer.zero_grad()
        ratio = limited(x).norm() / x.norm()
        (-ratio).backward()
        optimizer.step()
    assert ratio.item() == pytest.approx(0.8, abs=5e-3)
    assert ratio.item() <= 0.8 * (1 + 1e-5)


# both


def test_dykstra_finds_the_nearest_point_not_just_a_common_one():
    """A half-plane and a disc: alternating projections stop elsewhere."""
    point = torch.tensor([2.0, 1.5], dtype=torch.float64)

    def half_plane(x):
        return torch.stack([x[0].clamp(max=0.5), x[1]])

    def disc(x):
        return x / x.norm().clamp(min=1)

    found = dykstra(point, (half_plane, disc), tolerance=1e-10)
    torch.testing.assert_close(found, torch.tensor([0.5, 0.75**0.5], dtype=torch.float64), rtol=1e-6, atol=1e-6)
    alternating = point
    for _ in range(100):
        alternating = disc(half_plane(alternating))
    assert float((alternating - point).norm()) > float((found - point).norm()) + 1e-3


@pytest.mark.parametrize("distance", [0.0, 0.3, 2.0, 1e3])
@pytest.mark.parametrize("name", LAYERS)
def test_both_limits_hold(name, distance):
    layer = layer_of(name)
    limit = 0.5 * lipschitz_constant(layer)
    initial = scaled(layer.with_weight(torch.randn_like(layer.weight)), limit)
    found = constrain(layer, initial, lipschitz=limit, distance=distance)
    assert lipschitz_constant(layer.with_weight(found)) <= limit * (1 + 1e-4)
    assert float(group_norm(found - initial)) <= distance * (1 + 1e-9) + 1e-12


@pytest.mark.parametrize("name", ["linear", "circular"])
def test_both_limits_at_the_nearest_point(name):
    layer = layer_of(name)
    limit = 0.5 * lipschitz_constant(layer)
    initial = scaled(layer.with_weight(torch.randn_like(layer.weight)), 0.5 * limit)
    distance = 0.6 * float(group_norm(layer.weight - initial))
    found = constrain(layer, initial, lipschitz=limit, distance=distance, tolerance=1e-8)
    assert lipschitz_constant(layer.with_weight(found)) == pytest.approx(limit, rel=1e-3)
    assert float(group_norm(found - initial)) == pytest.approx(distance, rel=1e-3)
    outward = layer.weight - found
    for other in inside(layer, found, limit):
        other = initial + (other - initial) * min(1.0, distance / float(group_norm(other - initial)))
        assert float((outward * (other - found)).sum()) <= 2e-3 * float(outward.norm())


def test_what_keeps_the_limits_is_left_alone():
    layer = layer_of("zeros")
    assert constrain(layer, layer.weight, lipschitz=100.0, distance=1.0) is layer.weight
    assert constrain(layer, layer.weight, lipschitz=None, distance=None) is layer.weight
    assert clip(layer, 100.0) is layer.weight


def test_errors():
    layer = layer_of("zeros")
    with pytest.raises(ConfigError, match=r"limit=-1 must be at least 0"):
        clip(layer, -1)
    with pytest.raises(ConfigError, match="radius=nan must be at least 0"):
        onto_group_ball(layer.weight, layer.weight, float("nan"))
    with pytest.raises(ConfigError, match="over the limit of 0.1: there may be no weight"):
        constrain(layer, layer.weight, lipschitz=0.1, distance=1.0)
