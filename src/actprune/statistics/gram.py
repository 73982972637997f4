"""Mean and covariance matrix of the numbers that a layer reads together: the second moments behind least squares.

Formula: with r a reference (the first batch's mean) and d = x - r over all samples and positions, the sums n, sum d and
sum d d^T; then mu = r + sum d / n and G = sum d d^T / n - (mu - r)(mu - r)^T.
Source: Chan, Golub & LeVeque 1983. Products and sums in float64: a covariance of data offset by 10^4 keeps its digits, and
the result does not depend on how the data are cut into batches.

Cost: U^2 multiply-adds per position. Memory: U^2 + 2 U float64. Mergeable: yes, by sum once the references agree.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from actprune.statistics.base import Accumulator


class Gram(Accumulator):
    """Streaming mean and covariance of U numbers over all samples and positions.

    Args:
        n_units: how many numbers are read together (U).
    """

    n_values: Tensor  # ()
    reference: Tensor  # (U,) r
    shifted: Tensor  # (U,) sum of d
    products: Tensor  # (U, U) sum of d d^T

    def __init__(self, n_units: int) -> None:
        super().__init__(n_units)
        self.add_state("n_values", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("reference", torch.full((n_units,), -torch.inf, dtype=torch.float64), dist_reduce_fx="max")
        self.add_state("shifted", torch.zeros(n_units, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("products", torch.zeros(n_units, n_units, dtype=torch.float64), dist_reduce_fx="sum")

    def accumulate(self, x: Tensor, sample_ids: Tensor) -> Tensor:
        """Add a batch's products about the reference."""
        rows = x.transpose(1, 2).reshape(-1, self.n_units).double()
        torch.where(self.reference == -torch.inf, rows.mean(0), self.reference, out=self.reference)
        rows = rows - self.reference
        total = rows.sum(0)
        self.n_values += len(rows)
        self.shifted += total
        self.products.addmm_(rows.T, rows)
        return total

    def evaluate(self) -> Tensor:
        """Mean and covariance (divided by n), float64 (U, 1 + U): the mean is the first column."""
        offset = self.shifted / self.n_values
        covariance = self.products / self.n_values - torch.outer(offset, offset)
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
