"""Reconstruction error: what the network loses for good when a unit leaves and all its readers are refitted.

Formula: with G the covariance of what a layer reads, P = (G + lambda I)^-1 and W its weight, removing the columns u of a
unit and refitting the others optimally costs, per output position,

    e_u = tr W_u (P_uu)^-1 W_u^T,

the block form of the optimal brain surgeon's w^2 / [G^-1]. Units leave greedily, W and P follow every removal; a unit's
score is the rise of the error when its turn came, divided by what the layer's readers see in all (the variance of what
is read next) and by the budget the unit frees: error per multiply-add or parameter saved. Scores never fall in the order
of removal, and are comparable across groups as they are, so that one ranking spreads the cut over the network.
Source: Hassibi & Stork 1993; OSSCAR, arXiv:2403.12983. Deviation: 1/16 of the units left leave at a time once there are
more than 16, and share their joint error in proportion to their own.
Reads the second moments that ``LeastSquares`` compensation observes; ``Mean`` observes variances alone, and the error is then
that of folding means. Groups that no layer with a plain weight reads cannot be refitted: they have no score and stay whole.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from actprune.core.errors import ConfigError
from actprune.core.views import Criterion, GroupView, Reader

_AT_ONCE = 16


@dataclass(frozen=True)
class Reconstruction(Criterion):
    """Greedy reconstruction error per unit of the budget.

    Raises:
        ConfigError: ``ridge`` is not above 0.
    """

    ridge: float = 1e-3
    """lambda over the mean variance of what a layer reads, above 0."""

    comparable = True
    needs_readers = True
    unscored = (
        "compensation observed no second moments of what reads the others; pass compensation=LeastSquares(), or another "
        "criterion where no layer with a plain weight reads them"
    )

    def __post_init__(self) -> None:
        """Check the ridge."""
        if not 0 < self.ridge < math.inf:
            raise ConfigError(f"ridge={self.ridge!r} must be above 0, e.g. 1e-3")

    def score(self, view: GroupView) -> Tensor | None:
        """Rise of the relative error when the unit leaves in its turn, per unit of the budget; None where nothing is known."""
        readers = view.readers()
        if not readers:
            return None
        layers = [_Shrinking(reader, self.ridge) for reader in readers]
        rises = torch.zeros(view.size, dtype=torch.float64)
        left = torch.arange(view.size)
        highest = 0.0
        while len(left) > 1:
            own = torch.stack([layer.errors(left) for layer in layers]).sum(0)
            n = min(len(left) - 1, -(-len(left) // _AT_ONCE) if len(left) > _AT_ONCE else 1)
            order = torch.argsort(own, stable=True)
            leaving = order[:n]
            joint = sum(layer.remove(left[leaving]) for layer in layers)
            share = own[leaving] * (joint / own[leaving].sum().clamp(min=torch.finfo(torch.float64).tiny))
            # rounding apart, errors only rise; equal ones keep the order of removal
            rises[left[leaving]] = torch.cummax(share.clamp(min=highest), 0).values
            highest = float(rises[left[leaving]].max())
            left = left[order[n:].sort().values]
        rises[left] = 2 * highest + 1e-12
        return rises / view.cost


class _Shrinking:
    """One reader while units leave it: weight and inverse covariance of what is left."""

    def __init__(self, reader: Reader, ridge: float) -> None:
        covariance = reader.covariance.double()
        scale = covariance.diagonal().mean()
        # nothing varies: nothing is lost, whatever leaves
        damping = ridge * scale if scale > 0 else torch.ones_like(scale)
        self.weight = reader.weight.double() * (scale > 0)
        covariance = covariance + damping * torch.eye(len(covariance), dtype=torch.float64, device=covariance.device)
        self.inverse = torch.cholesky_inverse(torch.linalg.cholesky(covariance))
        self.columns = reader.columns.to(covariance.device)
        # outputs that do not vary at all must not make errors infinite
        least = 1e-6 * float(damping * self.weight.square().sum())
        self.size = max(reader.size, least, torch.finfo(torch.float64).tiny)

    def errors(self, units: Tensor) -> Tensor:
        """Relative error of removing each of the units alone."""
        index = self.columns[units.to(self.columns.device)]
        blocks = self.inverse[index.unsqueeze(2), index.unsqueeze(1)]
        weight = self.weight[:, index].permute(1, 2, 0)
        return ((weight * torch.linalg.solve(blocks, weight)).sum((1, 2)) / self.size).cpu()

    def remove(self, units: Tensor) -> float:
        """Relative error of removing the units together; the others take over what they can."""
        index = self.columns[units.to(self.columns.device)].flatten()
        block = self.inverse[index][:, index]
        weight = self.weight[:, index]
        solved = torch.linalg.solve(block, self.inverse[index])
        error = float((weight * torch.linalg.solve(block, weight.T).T).sum() / self.size)
        self.weight -= weight @ solved
        self.inverse -= self.inverse[:, index] @ solved
        return error
