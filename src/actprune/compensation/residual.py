"""One layer refitted from examples: what it misses is regressed on what it reads.

Formula: with x the layer's input patch, r = target - (W x + b) what it misses now, and moments over sampled positions,

    dW = C_rx (G + lambda I)^-1,    db = E r - dW E x,

which is the minimum of E |target - W' x - b'|^2 + lambda |W' - W|^2. C and G are centred, and not centred where the layer
has nowhere to put an intercept. Products of chunks in the activations' precision about the mean, sums in float64.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from actprune.compensation.solve import ridge_solve
from actprune.statistics.gram import add_products, symmetric

_CHUNK = 8192
_DEAD = 1e-4


@dataclass(frozen=True)
class Correction:
    """What a refit adds to a layer, and what it is worth."""

    weight: Tensor
    """(out, d) float64."""
    bias: Tensor
    """(out,) float64; zeros without an intercept."""
    before: float
    """Mean square of what the layer misses, summed over outputs."""
    after: float
    """The same once the correction is made, in closed form."""


def correction(
    x: Tensor,  # (R, d) what the layer reads at R positions
    missed: Tensor,  # (R, out) target minus output
    ridge: float,
    *,
    intercept: bool,
) -> Correction:
    """Regress what a layer misses on what it reads."""
    device = x.device
    width, outputs, n = x.shape[1], missed.shape[1], len(x)
    x_mean = x.double().mean(0) if intercept else torch.zeros(width, dtype=torch.float64, device=device)
    r_mean = missed.double().mean(0) if intercept else torch.zeros(outputs, dtype=torch.float64, device=device)
    gram = torch.zeros(width, width, dtype=torch.float64, device=device)
    cross = torch.zeros(width, outputs, dtype=torch.float64, device=device)
    square = torch.zeros((), dtype=torch.float64, device=device)
    for rows, rest in zip(x.split(_CHUNK), missed.split(_CHUNK), strict=True):
        rows = rows - x_mean.to(rows.dtype)
        rest = rest - r_mean.to(rest.dtype)
        add_products(gram, rows)
        cross += (rows.T @ rest).double()
        square += rest.double().square().sum()
    gram, cross, square = symmetric(gram) / n, cross / n, square / n
    weight = ridge_solve(gram, cross, ridge).T
    after = square - 2 * (weight * cross.T).sum() + ((weight @ gram) * weight).sum()
    before = square + r_mean.square().sum()
    bias = r_mean - weight @ x_mean
    return Correction(weight, bias, float(before), max(float(after), 0.0))


def before_norm(norm: Any, missed: Tensor) -> Tensor:
    """What is missed behind a batch norm, in the units before it; nothing where the norm's scale is next to zero."""
    scale = (norm.running_var + norm.eps).rsqrt()
    if norm.weight is not None:
        scale = scale * norm.weight.detach()
    dead = scale.abs() <= _DEAD * scale.abs().max()
    return torch.where(dead, 0.0, missed / torch.where(dead, 1.0, scale))
