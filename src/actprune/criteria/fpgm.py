"""Distance of a unit's weights from the geometric median of its group.

Formula: g(u) = sum_v ||w_u - w_v||_2 over the other units v, with w_u everything that leaves with unit u.
Source: FPGM, He et al., arXiv:1811.00250 (filters alone; here the consumer's side counts as well). The unit of least g
is the one nearest to the geometric median: the others can stand in for it.
Cost: the Gram matrix of the units, U^2 multiply-adds per weight; no data.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from actprune.core.views import Criterion, GroupView


@dataclass(frozen=True)
class FPGM(Criterion):
    """A unit that the others can stand in for leaves first."""

    def score(self, view: GroupView) -> Tensor:
        """Sum of distances to all other units."""
        gram = torch.zeros(view.size, view.size, dtype=torch.float64, device="cpu")
        for part in view.slices():
            rows = part.detach().double()
            rows = rows - rows.mean(0)  # distances stay, cancellation below shrinks
            gram += (rows @ rows.T).cpu()
        energy = gram.diagonal()
        squared = (energy.unsqueeze(1) + energy - 2 * gram).clamp(min=0).fill_diagonal_(0)
        return squared.sqrt().sum(1)
