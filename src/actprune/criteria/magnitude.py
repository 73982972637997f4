"""Norm of everything that leaves with a unit.

Formula: (sum |w|^p)^(1/p) over all slices of the unit: its filter, its bias and norm parameters, and its columns in
every consumer. Source: Li et al., arXiv:1608.08710 (L1 of the filter alone; here the consumer's side counts as well).
Cost: one pass over the weights; no data.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from actprune.core.errors import ConfigError
from actprune.core.views import Criterion, GroupView


@dataclass(frozen=True)
class Magnitude(Criterion):
    """L1 or L2 norm of the weights that leave with the unit.

    Raises:
        ConfigError: ``p`` is neither 1 nor 2.
    """

    p: int = 2
    """1 or 2."""

    def __post_init__(self) -> None:
        """Check the order of the norm."""
        if self.p not in (1, 2):
            raise ConfigError(f"p={self.p!r} must be 1 or 2")

    def score(self, view: GroupView) -> Tensor:
        """The norm."""
        total = torch.zeros(view.size, dtype=torch.float64, device="cpu")
        for part in view.slices():
            total += torch.linalg.vector_norm(part.detach().double(), ord=self.p, dim=1).pow(self.p).cpu()
        return total.pow(1 / self.p)
