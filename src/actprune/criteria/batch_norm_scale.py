"""Scale of the batch norms that a unit goes through.

Formula: B(u) = mean over batch norms of |gamma_u|; where a unit has several channels in one norm, their mean.
Source: network slimming, Liu et al., arXiv:1708.06519, who train with an L1 penalty on gamma first; without it gammas say less.
Several norms (a residual stream, whose every block ends in one) are averaged and groups without an affine batch norm stay
whole, as in Torch-Pruning's BNScaleImportance; which groups those are is logged, and it is an error where all are.
Cost: none to speak of; no data.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from actprune.core.views import Criterion, GroupView


@dataclass(frozen=True)
class BatchNormScale(Criterion):
    """A unit that its batch norms scale down leaves first."""

    unscored = "the others go through no batch norm with a scale; choose another criterion for them, e.g. Magnitude()"

    def may_score(self, view: GroupView) -> bool:
        """Whether there is a batch norm."""
        return bool(view.norms())

    def score(self, view: GroupView) -> Tensor | None:
        """Mean of |gamma|; None where there is no batch norm."""
        norms = view.norms()
        if not norms:
            return None
        return torch.stack([gamma.detach().double().abs().mean(1).cpu() for gamma in norms]).mean(0)
