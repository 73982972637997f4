"""Proximal operators of the group penalties under a diagonal metric, solved for many units at once.

For the elements x of every unit, with metric d > 0 and step a, the operator returns the minimiser z of

    1/2 sum_i d_i (z_i - x_i)^2 + a r(||z||)

    group lasso   r(s) = lam s
    group MCP     r(s) = lam s - s^2 / (2 gamma)  for s <= gamma lam,  gamma lam^2 / 2  beyond

Source: Deleu & Bengio 2021, arXiv:2102.03869. Both minimisers are z_i = s d_i x_i / (s e_i + t) with t = a lam, e = d
(lasso) or e = d - a / gamma (MCP), and s = ||z|| the root of sum_i (d_i x_i)^2 / (s e_i + t)^2 = 1. Below, y = d x / e and the
shifts t / e, so that z = s y / (s + shift).

Deviations from the reference code, each for exactness:

- Newton runs on 1 - 1 / sqrt(sum), with the sign turned, and not on sum - 1: it is concave and nearly linear, so that
  from the left the iterates still climb to the root and never pass it, in a third of the steps. The first step is
  taken from ||x||, right of the root, and lands left of it.
- It stops when the step bounds the residual below the rounding error of the dtype; the reference stops at 1e-7, which
  float32 rarely reaches, and clamps with an operation that does nothing.
- The group MCP has one minimum for certain only where gamma min(d) > a. The reference solves on regardless; here a unit
  outside that range is accepted when a bound proves its minimiser (zero, or x itself), and is an error otherwise.
- A unit that holds a NaN stays NaN.
"""

from __future__ import annotations

import math
from typing import Protocol

import torch
from torch import Tensor

from actprune.core.errors import ConfigError

MAX_ITERATIONS = 100


class Layout(Protocol):
    """How the elements of G units lie in a list of blocks."""

    def reduce(self, blocks: list[Tensor], how: str) -> Tensor:
        """``"sum"``, ``"amax"`` or ``"amin"`` over the elements of every unit, (G,)."""

    def spread(self, values: Tensor) -> list[Tensor]:
        """Values of every unit, (G,), in a shape that broadcasts against each block."""

    def scratch(self, blocks: list[Tensor]) -> list[Tensor]:
        """Uninitialised blocks like these; results may lie in them, valid until the layout reads again."""


class Matrix:
    """The plain layout: one block of shape (G, n)."""

    def reduce(self, blocks: list[Tensor], how: str) -> Tensor:
        """Reduce over the row."""
        return getattr(blocks[0], how)(1)

    def spread(self, values: Tensor) -> list[Tensor]:
        """One column."""
        return [values.unsqueeze(1)]

    def scratch(self, blocks: list[Tensor]) -> list[Tensor]:
        """Fresh memory."""
        return [torch.empty_like(block) for block in blocks]


def prox_group_lasso(
    x: list[Tensor],  # blocks of the layout
    threshold: Tensor | float,  # step * lam, positive, scalar or (G,)
    metric: list[Tensor] | None = None,  # positive, blocks like x; None = ones
    layout: Layout = Matrix(),  # noqa: B008
) -> list[Tensor]:
    """Shrink every unit towards zero by the group lasso; units with ``||d x|| <= threshold`` become exactly zero.

    Returns:
        The minimisers, blocks like ``x``.
    """
    spare = layout.scratch(x)
    norm = _norm(x, layout, spare)
    threshold = torch.as_tensor(threshold, dtype=norm.dtype, device=norm.device).expand_as(norm)
    if metric is None:
        return _scale(x, _shrinkage(norm, threshold), layout)
    norm_u = _norm(x, layout, spare, metric)
    zero = norm_u <= threshold
    floor = (norm_u - threshold) / layout.reduce(metric, "amax")
    shifts = [torch.div(t, d, out=out) for t, d, out in zip(layout.spread(threshold), metric, layout.scratch(x), strict=True)]
    return _solve(x, shifts, floor, norm, ~zero, zero, layout, spare)


def prox_group_mcp(
    x: list[Tensor],  # blocks of the layout
    step: float,
    lam: Tensor | float,  # positive, scalar or (G,)
    gamma: float,
    metric: list[Tensor] | None = None,  # positive, blocks like x; None = ones
    layout: Layout = Matrix(),  # noqa: B008
) -> list[Tensor]:
    """Shrink every unit by the group MCP: small ones to zero, those with ``||x|| > gamma lam`` not at all.

    Returns:
        The minimisers, blocks like ``x``.

    Raises:
        ConfigError: ``gamma * min(metric) <= step`` in a unit whose minimiser no bound proves: there may be several
            minima.
    """
    spare = layout.scratch(x)
    norm = _norm(x, layout, spare)
    lam = torch.as_tensor(lam, dtype=norm.dtype, device=norm.device).expand_as(norm)
    if metric is None:
        if gamma <= step:
            raise _several_minima(gamma, step, 1.0, len(norm))
        return _scale(x, _shrinkage(norm, step * lam).mul_(gamma / (gamma - step)).clamp_(max=1), layout)
    norm_u = _norm(x, layout, spare, metric)
    threshold = step * lam
    zero = norm_u <= threshold
    kept = norm > gamma * lam
    smallest = layout.reduce(metric, "amin")
    several = smallest * gamma <= step
    if bool(several.any()):
        proven_zero, proven_kept = _proven(x, metric, norm, norm_u, smallest, step, lam, gamma, layout)
        unproven = several & ~proven_zero & ~proven_kept & ~norm_u.isnan()
        if bool(unproven.any()):
            raise _several_minima(gamma, step, float(smallest[unproven].min()), int(unproven.sum()))
        zero = torch.where(several, proven_zero, zero)
        kept = torch.where(several, proven_kept & ~proven_zero, kept)
    e = [torch.sub(d, step / gamma, out=out) for d, out in zip(metric, layout.scratch(x), strict=True)]
    floor = (norm_u - threshold) / layout.reduce(e, "amax")
    y = layout.scratch(x)
    for block, d, below, out in zip(x, metric, e, y, strict=True):
        torch.mul(block, d, out=out).div_(below)
    shifts = [torch.div(t, below, out=below) for t, below in zip(layout.spread(threshold), e, strict=True)]
    z = _solve(y, shifts, floor, norm, ~(zero | kept), zero, layout, spare)
    return [torch.where(mask, a, b) for mask, a, b in zip(layout.spread(kept), x, z, strict=True)]


def _proven(
    x: list[Tensor],
    metric: list[Tensor],
    norm: Tensor,
    norm_u: Tensor,
    smallest: Tensor,
    step: float,
    lam: Tensor,
    gamma: float,
    layout: Layout,
) -> tuple[Tensor, Tensor]:
    """Units whose global minimiser is zero, and x, however many minima there are.

    Zero: the penalty lies above its chord, a r(s) >= t s / 2 up to s = gamma lam, and beyond the quadratic saves at
    most sum d x^2 / 2. x: sqrt(d_min) (||x|| - s) >= sqrt(a / gamma) (gamma lam - s) for all s in [0, gamma lam],
    linear in s, so at both ends.
    """
    energy = layout.reduce([d * block * block for d, block in zip(metric, x, strict=True)], "sum")
    proven_zero = (norm_u <= step * lam / 2) & (energy <= step * gamma * lam.square())
    return proven_zero, norm * (smallest * gamma / step).sqrt() >= gamma * lam


def _several_minima(gamma: float, step: float, smallest: float, units: int) -> ConfigError:
    return ConfigError(
        f"group MCP with gamma={gamma:g} is exact only for gamma > step / min(metric) = {step:g} / {smallest:g} = "
        f"{step / smallest:g} ({units} units are below); "
        "raise gamma above lr / eps, lower lr, raise eps, or use group_lasso"
    )


def _norm(
    blocks: list[Tensor],
    layout: Layout,
    spare: list[Tensor],  # overwritten
    factors: list[Tensor] | None = None,  # what the blocks are multiplied by
) -> Tensor:
    others = blocks if factors is None else factors
    products = [torch.mul(block, other, out=out) for block, other, out in zip(blocks, others, spare, strict=True)]
    if factors is not None:
        torch._foreach_mul_(products, products)
    return layout.reduce(products, "sum").sqrt_()


def _shrinkage(norm: Tensor, threshold: Tensor) -> Tensor:
    """(1 - threshold / norm)+, NaN kept, 0 / 0 = 0."""
    return (1 - threshold / norm).clamp_(min=0).masked_fill_(norm == 0, 0)


def _scale(x: list[Tensor], factors: Tensor, layout: Layout) -> list[Tensor]:
    return list(torch._foreach_mul(x, layout.spread(factors)))


def _solve(
    y: list[Tensor],  # d x / e
    shifts: list[Tensor],  # t / e
    floor: Tensor,  # (G,) a lower bound of the root
    start: Tensor,  # (G,) an upper bound of the root
    searched: Tensor,  # (G,) units that have a root
    zero: Tensor,  # (G,) units that become zero
    layout: Layout,
    spare: list[Tensor],  # overwritten
) -> list[Tensor]:
    """``s y / (s + shift)`` at the root s of ``||y / (s + shift)|| = 1``; units of neither mask are the caller's to fill."""
    epsilon = torch.finfo(start.dtype).eps
    root = torch.maximum(start, floor)
    terms = layout.scratch(y)

    def divide(roots: list[Tensor]) -> list[Tensor]:
        sums = [torch.add(shift, r, out=out) for shift, r, out in zip(shifts, roots, spare, strict=True)]
        for block, below, out in zip(y, sums, terms, strict=True):
            torch.div(block, below, out=out)
        return sums

    for _ in range(MAX_ITERATIONS):
        sums = divide(layout.spread(root))
        torch._foreach_mul_(terms, terms)
        total = layout.reduce(terms, "sum")
        torch._foreach_div_(terms, sums)
        slope = layout.reduce(terms, "sum")
        excess = total.sqrt().sub_(1)
        new = torch.maximum(root + total * excess / slope, floor)
        # curvature -3 Var(1 / sums), at most 3 / (4 root^2): a step below sqrt(eps) root leaves under eps / 2
        moving = searched & ((new - root).abs() > math.sqrt(epsilon) * new) & (excess.abs() > 4 * epsilon)
        root = new
        if not bool(moving.any()):
            break
    roots = layout.spread(root.masked_fill_(zero, 0))
    divide(roots)
    torch._foreach_mul_(terms, roots)
    return terms
