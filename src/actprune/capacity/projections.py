"""Projections of a layer's weight onto what the capacity bounds constrain, and onto both together.

- ``onto_group_ball``: nearest weight with (2, 1) distance to initialisation of at most b: every group's norm is lowered by one
  threshold (Liu, Ji and Ye, "Multi-task feature learning via efficient l2,1-norm minimization", UAI 2009), found exactly by
  sorting, as for the simplex (Duchi et al., ICML 2008).
- ``clip``: Lipschitz constant at most s. The nearest such weight for linear layers, 1x1 convolutions and scales (singular
  values are clipped) and for convolutions that wrap around with stride 1 (clipped in Fourier space; Dykstra brings it back to
  the window). For other convolutions the nearest weight has no closed form; they are scaled by s / sigma, direction kept.
- ``dykstra``: the nearest point of an intersection from projections on its parts (Boyle and Dykstra 1986).
- ``constrain``: both constraints. What Dykstra leaves over is taken back on the segment to a weight that satisfies both, so the
  result does too.

``rkwitt/excess_capacity`` stops Dykstra after 10 sweeps, where only the set that comes last is satisfied, takes no stride into
account, and refuses b = 0, a frozen layer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from actprune.capacity.distance import group_norm
from actprune.capacity.lipschitz import blocks, from_blocks, is_circulant, is_pointwise, lipschitz_constant, off_grid, on_grid
from actprune.capacity.maps import LinearMap
from actprune.core.errors import ConfigError

Projection: TypeAlias = Callable[[Tensor], Tensor]

_ROUNDS = 5
_HALVINGS = 12


def onto_group_ball(weight: Tensor, centre: Tensor, radius: float) -> Tensor:
    """The nearest weight whose (2, 1) distance to ``centre`` is at most ``radius``.

    Args:
        weight: kernel (out, in / groups, *window) or matrix (out, in).
        centre: of the same shape.
        radius: at least 0; at 0 the centre itself.

    Raises:
        ConfigError: radius is negative or NaN.
    """
    _check("radius", radius)
    difference = weight - centre
    norms = torch.linalg.vector_norm(difference, dim=1, keepdim=True)
    if float(norms.sum()) <= radius:
        return weight
    ordered = norms.flatten().sort(descending=True).values
    thresholds = (ordered.cumsum(0) - radius) / torch.arange(1, len(ordered) + 1, device=ordered.device)
    last = max(int((ordered > thresholds).sum()), 1)  # groups that stay
    left = (norms - thresholds[last - 1]).clamp(min=0) / norms.clamp(min=torch.finfo(norms.dtype).tiny)
    return centre + difference * left


def clip(layer: LinearMap, limit: float, *, tolerance: float = 1e-5) -> Tensor:
    """The layer's weight with its Lipschitz constant at most ``limit``; the weight itself where it is already.

    Args:
        layer: map and weight.
        limit: at least 0.
        tolerance: relative, of iterated constants and of Dykstra's sweeps.

    Raises:
        ConfigError: limit is negative or NaN.
    """
    _check("limit", limit)
    sets = _lipschitz_sets(layer, limit)
    if sets is None:
        return scaled(layer, limit, tolerance=tolerance)
    if len(sets.projections) == 1:
        return sets.projections[0](layer.weight)
    if lipschitz_constant(layer) <= limit:
        return layer.weight
    weight = sets.leave(dykstra(sets.enter(layer.weight), sets.projections, tolerance=tolerance))
    return scaled(layer.with_weight(weight), limit, tolerance=tolerance)


def scaled(layer: LinearMap, limit: float, *, tolerance: float = 1e-5) -> Tensor:
    """The layer's weight times min(1, limit / constant): within ``limit``, in its own direction."""
    constant = lipschitz_constant(layer, tolerance=tolerance)
    return layer.weight if constant <= limit else layer.weight * (limit / constant)


def dykstra(point: Tensor, projections: Sequence[Projection], *, tolerance: float = 1e-6, sweeps: int = 500) -> Tensor:
    """The nearest point of the intersection of convex sets, approached from orthogonal projections on each.

    Args:
        point: where to start.
        projections: one per set; the result lies in the last one's.
        tolerance: stop when no set is missed, and nothing moved in a sweep, by more than this share of the point's norm.
        sweeps: at most this many.
    """
    parts = [torch.zeros_like(point) for _ in projections]
    results = [point for _ in projections]
    limit = tolerance * float(torch.linalg.vector_norm(point))
    for _ in range(sweeps):
        moved = 0.0
        for k, projection in enumerate(projections):
            shifted = point + parts[k]
            point = projection(shifted)
            parts[k] = shifted - point
            moved = max(moved, float(torch.linalg.vector_norm(point - results[k])))
            results[k] = point
        if max(moved, *(float(torch.linalg.vector_norm(result - point)) for result in results)) <= limit:
            break
    return point


def constrain(
    layer: LinearMap,
    initial: Tensor,
    *,
    lipschitz: float | None,
    distance: float | None,
    tolerance: float = 1e-5,
) -> Tensor:
    """The layer's weight under both constraints: the nearest where projections are known, else a near one.

    Args:
        layer: map and weight of a convolution or linear layer.
        initial: weight at initialisation, of the same shape, with a Lipschitz constant of at most ``lipschitz``.
        lipschitz: s, at least 0; None: free.
        distance: b, at least 0; None: free.
        tolerance: relative, of constants and of Dykstra's sweeps.

    Raises:
        ConfigError: a limit is negative, or the initialisation breaks ``lipschitz``, so that the intersection may be empty.
    """
    if distance is None:
        return layer.weight if lipschitz is None else clip(layer, lipschitz, tolerance=tolerance)
    weight = onto_group_ball(layer.weight, initial, distance)
    if lipschitz is None:
        return weight
    _check("limit", lipschitz)
    start = lipschitz_constant(layer.with_weight(initial), tolerance=tolerance)
    if start > lipschitz * (1 + 10 * tolerance):
        raise ConfigError(
            f"the initial weight has Lipschitz constant {start:.6g}, over the limit of {lipschitz:.6g}: there may be no weight "
            "near enough to it; scale it first, or raise the limit"
        )
    if _within(layer, weight, lipschitz, tolerance):
        return weight
    sets = _lipschitz_sets(layer, lipschitz)
    if sets is None:
        for _ in range(_ROUNDS):
            near = scaled(layer.with_weight(weight), lipschitz, tolerance=tolerance)
            weight = onto_group_ball(near, initial, distance)
            if _within(layer, weight, lipschitz, tolerance):
                return weight
    else:
        centre = sets.enter(initial)
        parts = (*sets.projections, lambda point: onto_group_ball(point, centre, distance))
        weight = sets.leave(dykstra(sets.enter(layer.weight), parts, tolerance=tolerance))
    return _taken_back(layer, weight, _inner(initial, distance), lipschitz, tolerance)


@dataclass(frozen=True)
class _Sets:
    """Orthogonal projections whose intersection is a set of weights, and the space they act in."""

    projections: tuple[Projection, ...]
    enter: Projection = staticmethod(lambda weight: weight)
    leave: Projection = staticmethod(lambda weight: weight)


def _lipschitz_sets(layer: LinearMap, limit: float) -> _Sets | None:
    """What makes up the weights of Lipschitz constant at most ``limit``, where projections on it are known."""
    if layer.kind == "scale":
        return _Sets((lambda weight: weight.clamp(-limit, limit),))
    if layer.kind == "linear":
        return _Sets((lambda weight: _clipped(weight, limit),))
    if is_pointwise(layer):
        parts = (layer.groups, -1, layer.weight.shape[1])
        return _Sets((lambda weight: _clipped(weight.reshape(parts), limit).reshape(weight.shape),))
    if not is_circulant(layer) or any(d * (k - 1) >= n for k, d, n in _extents(layer)):
        return None
    window = on_grid(layer.with_weight(torch.ones_like(layer.weight)))

    def clipped(grid: Tensor) -> Tensor:
        return from_blocks(_clipped(blocks(grid, layer.groups), limit), grid.shape)

    return _Sets(
        (clipped, lambda grid: grid * window),
        lambda weight: on_grid(layer.with_weight(weight)),
        lambda grid: off_grid(grid, layer),
    )


def _extents(layer: LinearMap) -> zip[tuple[int, int, int]]:
    return zip(layer.weight.shape[2:], layer.dilation, layer.input_shape[1:], strict=True)


def _inner(initial: Tensor, distance: float) -> Tensor:
    """The initial weight made smaller by half of what its distance allows: inside both sets wherever they have an inside."""
    norm = float(group_norm(initial))
    return initial * (1 - min(distance / norm, 1.0) / 2) if norm > 0 else initial


def _taken_back(layer: LinearMap, weight: Tensor, inner: Tensor, limit: float, tolerance: float) -> Tensor:
    """The point nearest to ``weight`` on its segment to ``inner`` that keeps the limit; both sets are convex."""
    if _within(layer, weight, limit, tolerance):
        return weight
    low, high = 0.0, 1.0
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        keeps = _within(layer, inner + middle * (weight - inner), limit, tolerance)
        low, high = (middle, high) if keeps else (low, middle)
    return inner + low * (weight - inner)


def _within(layer: LinearMap, weight: Tensor, limit: float, tolerance: float) -> bool:
    return lipschitz_constant(layer.with_weight(weight), tolerance=tolerance) <= limit * (1 + tolerance)


def _clipped(matrices: Tensor, limit: float) -> Tensor:
    """Matrices (..., out, in) with singular values of at most ``limit``."""
    u, values, v = torch.linalg.svd(matrices, full_matrices=False)
    if float(values.max()) <= limit:
        return matrices
    return matrices - u @ ((values - limit).clamp(min=0)[..., None] * v)


def _check(name: str, value: float) -> None:
    if not value >= 0:
        raise ConfigError(f"{name}={value} must be at least 0")
