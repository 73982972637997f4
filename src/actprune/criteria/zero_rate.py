"""Share of activations that are not exactly zero.

Formula: 1 - APoZ, APoZ(u) = #{a = 0} / n. Source: Hu et al., arXiv:1607.03250, who remove the units of highest APoZ.
Deviation: read where the consumers read; behind an activation function that never gives zero all units score 1.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from actprune.core.views import Criterion, GroupView, Statistic
from actprune.criteria.combine import score_sites
from actprune.statistics import Activity


@dataclass(frozen=True)
class ZeroRate(Criterion):
    """A unit that is zero most of the time leaves first."""

    def statistics(self) -> dict[str, Callable[[int], Statistic]]:
        """One count of zeros per site."""
        return {"activity": Activity}

    def score(self, view: GroupView) -> Tensor:
        """Share of nonzero activations, in [0, 1]."""
        return score_sites(view, "activity", lambda activity: 1 - activity.compute()[:, 0])
