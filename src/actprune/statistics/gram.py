"""Mean and covariance matrix of the numbers that a layer reads together: the second moments behind least squares.

Formula: with r a reference (the first sample's mean) and d = x - r over all samples and positions, the sums n, sum d and
sum d d^T; then mu = r + sum d / n and G = sum d d^T / n - (mu - r)(mu - r)^T.
Source: Chan, Golub & LeVeque 1983. Products and sums in float64: a covariance of data offset by 10^4 keeps its digits, and
the result does not depend on how the data are cut into batches.

Cost: 5/8 U^2 multiply-adds per position (U from 128; below that U^2). Memory: U^2 + 2 U float64.
Mergeable: yes, by sum once the references agree.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from actprune.statistics.base import Accumulator

_BLOCKS, _WORTH_IT = 4, 128
"""Blocks of rows of a symmetric product that are computed from the diagonal on, and from which width."""


def add_products(
    total: Tensor,  # (d, d) float64, changed in place
    rows: Tensor,  # (R, d)
) -> None:
    """Add rows^T rows, in the rows' precision, to the upper triangle; ``symmetric`` reads the sum, nothing else may."""
    size = -(-len(total) // _BLOCKS) if len(total) >= _WORTH_IT else len(total)
    for start in range(0, len(total), size):
        left, right = rows[:, start : start + size].T, rows[:, start:]
        place = total[start : start + size, start:]
        if rows.dtype == total.dtype:
            place.addmm_(left, right)
        else:
            place.add_(left @ right)


def symmetric(total: Tensor) -> Tensor:
    """The matrix whose upper triangle ``add_products`` summed."""
    return total.triu() + total.triu(1).T


class Gram(Accumulator):
    """Streaming mean and covariance of U numbers over all samples and positions.

    Args:
        n_units: how many numbers are read together (U).
    """

    n_values: Tensor  # ()
    reference: Tensor  # (U,) r
    shifted: Tensor  # (U,) sum of d
    products: Tensor  # (U, U) sum of d d^T, its upper triangle

    def __init__(self, n_units: int) -> None:
        super().__init__(n_units)
        self.add_state("n_values", torch.zeros((), dtype=torch.float64, device="cpu"), dist_reduce_fx="sum")
        self.add_state("reference", torch.full((n_units,), -torch.inf, dtype=torch.float64, device="cpu"), dist_reduce_fx="max")
        self.add_state("shifted", torch.zeros(n_units, dtype=torch.float64, device="cpu"), dist_reduce_fx="sum")
        self.add_state("products", torch.zeros(n_units, n_units, dtype=torch.float64, device="cpu"), dist_reduce_fx="sum")

    def accumulate(self, x: Tensor, sample_ids: Tensor) -> Tensor:
        """Add a batch's products about the reference."""
        torch.where(self.reference == -torch.inf, x[0].double().mean(1), self.reference, out=self.reference)
        rows = x.transpose(1, 2).reshape(-1, self.n_units) - self.reference
        total = rows.sum(0)
        self.n_values += len(rows)
        self.shifted += total
        add_products(self.products, rows)
        return total

    def evaluate(self) -> Tensor:
        """Mean and covariance (divided by n), float64 (U, 1 + U): the mean is the first column."""
        offset = self.shifted / self.n_values
        covariance = symmetric(self.products) / self.n_values - torch.outer(offset, offset)
        return torch.cat([(self.reference + offset).unsqueeze(1), covariance], dim=1)

    def scale(self) -> dict[str, Tensor]:
        """The reference; -inf where this shard saw nothing."""
        return {"reference": self.reference}

    def aligned(self, shared: Mapping[str, Tensor]) -> None:
        """Express the sums about the shards' common reference."""
        move = torch.where(self.reference == -torch.inf, 0.0, self.reference - shared["reference"])
        cross = torch.outer(move, self.shifted)
        self.products += cross + cross.T + self.n_values * torch.outer(move, move)
        self.shifted += self.n_values * move
        self.reference.copy_(shared["reference"])
