"""What the loss would change by, to first order, if a unit were gated off, squared and averaged over samples.

Formula: T(u) = (1/N) sum_i (sum_p a_iup dL_i/da_iup)^2, the square of the gradient of sample i's loss with respect to a gate
that multiplies all positions of the unit. Source: Molchanov et al., arXiv:1906.10771 (gates).
The gate sits where the consumer reads: the gradient is what comes back through this consumer alone.

Cost: one sum over positions per element, beside a forward and a backward pass of the network. Memory: U float64. Mergeable:
yes, by sum.
"""

from __future__ import annotations

import torch
from torch import Tensor

from actprune.statistics.base import Accumulator


class GateTaylor(Accumulator):
    """Mean over samples of the squared sum over positions.

    Args:
        n_units: units of the group at this site (U).
    """

    whole_maps = True
    differentiates = "loss"
    squares: Tensor  # (U,)

    def __init__(self, n_units: int) -> None:
        super().__init__(n_units)
        self.add_state("squares", torch.zeros(n_units, dtype=torch.float64, device="cpu"), dist_reduce_fx="sum")

    def accumulate(self, x: Tensor, sample_ids: Tensor) -> Tensor:
        """Add a batch of contributions a dL/da."""
        squares = x.sum(2).double().square().sum(0)
        self.squares += squares
        return squares

    def evaluate(self) -> Tensor:
        """Mean square, float64 (U,)."""
        return self.squares / self.n_samples
