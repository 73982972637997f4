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

    joinable = True
    n_values: Tensor  # ()
    zeros: Tensor  # (U,)
    positives: Tensor  # (U,)

    def __init__(self, n_units: int) -> None:
        super().__init__(n_units)
        self.add_state("n_values", torch.zeros((), dtype=torch.float64, device="cpu"), dist_reduce_fx="sum")
        self.add_state("zeros", torch.zeros(n_units, dtype=torch.float64, device="cpu"), dist_reduce_fx="sum")
        self.add_state("positives", torch.zeros(n_units, dtype=torch.float64, device="cpu"), dist_reduce_fx="sum")

    def accumulate(self, x: Tensor, sample_ids: Tensor) -> Tensor:
        """Count a batch's zeros and positive values."""
        rows = x.flatten(1)
        flags = torch.empty_like(rows)  # comparisons into float32: summing bool tensors is several times slower
        zeros = torch.eq(rows, 0, out=flags).sum(0)
        positives = torch.gt(rows, 0, out=flags).sum(0)
        # over samples in float32, then over positions in float64: fast, and exact for flags of under 2^24 samples
        sums = torch.stack([zeros, positives, rows.sum(0)]).view(3, self.n_units, -1).sum(2, dtype=torch.float64)
        self.n_values.add_(len(x) * x.shape[2])
        self.zeros.add_(sums[0])
        self.positives.add_(sums[1])
        return sums[2]

    def evaluate(self) -> Tensor:
        """Share of zeros and share of positive values, float64 (U, 2)."""
        return torch.stack([self.zeros, self.positives], dim=1) / self.n_values
