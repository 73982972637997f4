"""How often a unit is exactly zero, and how often it is on.

Formula: zeros[u] = #{a = 0} / n, on[u] = #{a > 0} / n over all samples and positions.
Source: APoZ, Hu et al., arXiv:1607.03250 (zeros); ON/OFF states of EASIER, arXiv:2404.18949. Deviation: EASIER reads
the state before the activation function (z >= 0); read after a ReLU, on = {z > 0} differs from it at z = 0 only.

Cost: three cheap passes per element. Memory: 2 U float64. Mergeable: yes, exactly.
"""

from __future__ import annotations

import torch
from torch import Tensor

from actprune.statistics.base import Accumulator


class Activity(Accumulator):
    """Shares of exact zeros and of positive activations per unit.

    Args:
        n_units: units of the group at this site (U).
    """

    n_values: Tensor  # ()
    zeros: Tensor  # (U,)
    positives: Tensor  # (U,)

    def __init__(self, n_units: int) -> None:
        super().__init__(n_units)
        self.add_state("n_values", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("zeros", torch.zeros(n_units, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("positives", torch.zeros(n_units, dtype=torch.float64), dist_reduce_fx="sum")

    def accumulate(self, x: Tensor, sample_ids: Tensor) -> Tensor:
        """Count a batch's zeros and positive values."""
        flags = torch.empty_like(x)  # comparisons into float32: summing bool tensors is several times slower
        self.n_values += len(x) * x.shape[2]
        self.zeros += _count(torch.eq(x, 0, out=flags))
        self.positives += _count(torch.gt(x, 0, out=flags))
        return x.sum(2).sum(0, dtype=torch.float64)

    def evaluate(self) -> Tensor:
        """Share of zeros and share of positive values, float64 (U, 2)."""
        return torch.stack([self.zeros, self.positives], dim=1) / self.n_values


def _count(flags: Tensor) -> Tensor:
    """Sum over samples and positions, exact: float32 within a sample (below 2^24), float64 across samples."""
    return flags.sum(2).sum(0, dtype=torch.float64)
