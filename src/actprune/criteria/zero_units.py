"""Units that training brought to zero, which is no ranking: they leave, whatever their number, and no others.

Formula: R(u) = sqrt(mean w^2) over the elements that the unit owns: filter, bias, norm scale and shift, and the weights that
read it where what they produce may not be cut (the rule: ``actprune.sparsity.unit_groups``). R(u) = 0 if and only if all of
them are zero; then the unit says the constant f(0), nothing at all for f(0) = 0, and taking it away changes no output.
Source: what the proximal optimizers of Deleu & Bengio 2021, arXiv:2102.03869 leave at exactly zero; with a ``threshold``
above 0 the pruning stage of SeReNe, Tartaglione et al., arXiv:2102.03773.
Cost: one pass over the weights; no data.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from actprune.core.errors import ConfigError
from actprune.core.views import Criterion, GroupView


@dataclass(frozen=True)
class ZeroUnits(Criterion):
    """All units whose own elements have at most this root mean square leave.

    Raises:
        ConfigError: the threshold is negative or not finite.
    """

    threshold: float = 0.0
    """Root mean square, at least 0; 0: exactly zero."""

    comparable = True
    unscored = "the elements of their units all belong to units of other groups"

    def __post_init__(self) -> None:
        """Check the threshold."""
        if not 0 <= self.threshold < math.inf:
            raise ConfigError(f"threshold={self.threshold!r} must be a finite number of at least 0; 0 takes exact zeros only")

    def score(self, view: GroupView) -> Tensor | None:
        """Root mean square of the unit's own elements."""
        rows = [row.double().cpu() for row in view.own()]
        return torch.cat(rows, dim=1).square().mean(1).sqrt() if rows else None
