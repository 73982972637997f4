"""Reconstruction error: what the network loses for good when a unit leaves and all its readers are refitted.

Formula: with G the covariance of what a layer reads, P = (G + lambda I)^-1 and W its weight, removing the columns u of a
unit and refitting the others optimally costs, per output position,

    e_u = tr W_u (P_uu)^-1 W_u^T = tr (P_uu)^-1 M_uu with M = W^T W,

the block form of the optimal brain surgeon's w^2 / [G^-1]. Units leave greedily, one at a time, and P and M follow every
removal: with P_uu = L L^T, V = P_:u L^-T, K = M_:u L^-T and E = L^-1 M_uu L^-T (e_u is its trace),

    P - V V^T,    M - V K^T - K V^T + V E V^T.

A unit's score is the rise of the error when its turn came, divided by what the layer's readers see in all (the variance of
what is read next) and by the budget the unit frees: error per multiply-add or parameter saved. Scores rise strictly in the
order of removal, and are comparable across groups as they are, so that one ranking spreads the cut over the network.
Source: Hassibi & Stork 1993; OSSCAR, arXiv:2403.12983. Deviation: rises that fall are lifted to the greatest so far.
Reads the second moments that ``LeastSquares`` compensation observes; ``Mean`` observes variances alone, and the error is then
that of folding means. Groups that no layer with a plain weight reads cannot be refitted: they have no score and stay whole.
Cost: O(d^3) per reader of d inputs, as one inversion. Memory: two d x d float64 matrices.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from actprune.core.errors import ConfigError
from actprune.core.views import Criterion, GroupView, Reader

_PENDING = 32
"""Removals after which P and M are brought up to date: many at once are a product of matrices, each alone a pass over both."""
_STEP = 2.0**-40
"""Least distance of scores over the greatest: far above what normalising rounds off, far below any error that matters."""


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
        left, order, rises = torch.arange(view.size, device="cpu"), [], []
        while len(left) > 1:
            gone: list[int] = []
            while len(gone) < min(_PENDING, len(left) - 1):
                errors = torch.stack([layer.errors() for layer in layers]).sum(0)
                errors[gone] = math.inf
                gone.append(int(errors.argmin()))
                rises.append(float(errors[gone[-1]]))
                for layer in layers:
                    layer.remove(gone[-1])
            order += left[gone].tolist()
            stays = torch.ones(len(left), dtype=torch.bool, device="cpu")
            stays[gone] = False
            staying = stays.nonzero().flatten()
            left = left[staying]
            for layer in layers:
                layer.settle(staying)
        scores = torch.empty(view.size, dtype=torch.float64, device="cpu")
        scores[order + left.tolist()] = _rising(rises) / view.cost
        return scores


def _rising(rises: list[float]) -> Tensor:
    """Scores in the order of removal, float64 (U,), of the U - 1 rises: ties, and rises that fall, keep that order."""
    highest = torch.tensor([0.0, *rises], dtype=torch.float64, device="cpu").cummax(0).values
    last = 2 * highest[-1] + 1e-12
    return torch.cat([highest[1:], last.view(1)]) + _STEP * last * torch.arange(len(highest), device="cpu")


class _Shrinking:
    """One reader while units leave it: inverse covariance P and squared weight M of the columns of the units that are left.

    Both are kept as they were when last settled; what left since is subtracted where they are read: P - V V^T, and
    M - V K^T - K V^T with K less V E / 2. The units' own blocks are always up to date.
    """

    def __init__(self, reader: Reader, ridge: float) -> None:
        covariance = reader.covariance.double()
        scale = covariance.diagonal().mean()
        # nothing varies: nothing is lost, whatever leaves
        damping = ridge * scale if scale > 0 else torch.ones_like(scale)
        weight = reader.weight.double() * (scale > 0)
        # outputs that do not vary at all must not make errors infinite
        least = 1e-6 * float(damping * weight.square().sum())
        self._size = max(reader.size, least, torch.finfo(torch.float64).tiny)
        covariance = covariance + damping * torch.eye(len(covariance), dtype=torch.float64, device=covariance.device)
        inverse = torch.cholesky_inverse(torch.linalg.cholesky(covariance))
        columns = reader.columns.to(covariance.device)
        self._k, flat = columns.shape[1], columns.flatten()
        self._inverse, self._squares = inverse[flat][:, flat], weight[:, flat].T @ weight[:, flat]
        self._restart()

    def _restart(self) -> None:
        """Nothing is pending."""
        self._inverse_blocks, self._square_blocks = self._blocks(self._inverse), self._blocks(self._squares)
        n = len(self._inverse)
        self._v, self._half = (self._inverse.new_zeros(n, min(n, _PENDING * self._k)) for _ in range(2))
        self._n_pending = 0

    def _blocks(self, x: Tensor) -> Tensor:
        """The units' own blocks, (units, k, k)."""
        n = len(x) // self._k
        return x.view(n, self._k, n, self._k).diagonal(dim1=0, dim2=2).movedim(2, 0).clone()

    def errors(self) -> Tensor:
        """Relative error of removing each of the units alone, (units,) on the CPU; 0 of those that left."""
        solved = torch.linalg.solve(self._inverse_blocks, self._square_blocks)
        return (solved.diagonal(dim1=1, dim2=2).sum(1).clamp(min=0) / self._size).cpu()

    def remove(self, unit: int) -> None:
        """Let a unit leave; the others take over what they can."""
        rows, n = slice(unit * self._k, (unit + 1) * self._k), self._n_pending * self._k
        v, half = self._v[:, :n], self._half[:, :n]
        column = self._inverse[:, rows] - v @ v[rows].T
        square = self._squares[:, rows] - v @ half[rows].T - half @ v[rows].T
        root = torch.linalg.cholesky(column[rows])
        new = torch.linalg.solve_triangular(root.T, column, upper=True, left=False)
        other = torch.linalg.solve_triangular(root.T, square, upper=True, left=False)
        other = other - new @ torch.linalg.solve_triangular(root, other[rows], upper=False) / 2
        for x in (self._inverse, self._squares, v, half, new, other):  # nothing of what left may reach the others again
            x[rows] = 0
        self._v[:, n : n + self._k], self._half[:, n : n + self._k] = new, other
        self._n_pending += 1
        new, other = new.view(-1, self._k, self._k), other.view(-1, self._k, self._k)
        cross = new @ other.mT
        self._inverse_blocks -= new @ new.mT
        self._square_blocks -= cross + cross.mT
        self._inverse_blocks[unit], self._square_blocks[unit] = torch.eye(self._k, device="cpu"), 0

    def settle(self, staying: Tensor) -> None:
        """Bring both matrices up to date, and drop what left; ``staying``: the other units, ascending."""
        taken = torch.arange(self._k, device="cpu") + self._k * staying.unsqueeze(1)
        taken = taken.flatten().to(self._inverse.device)
        v, half = self._v[taken], self._half[taken]
        self._inverse = self._inverse[taken][:, taken].addmm_(v, v.T, alpha=-1)
        self._squares = self._squares[taken][:, taken].addmm_(v, half.T, alpha=-1).addmm_(half, v.T, alpha=-1)
        self._restart()
