"""Mean rank of a unit's feature maps.

Formula, source and cost: see ``actprune.statistics.rank`` (HRank, Lin et al., arXiv:2002.10179).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from actprune.core.views import Criterion, GroupView, Statistic
from actprune.criteria.combine import score_sites
from actprune.statistics import MapRank


@dataclass(frozen=True)
class HRank(Criterion):
    """A unit whose maps have low rank leaves first."""

    def statistics(self) -> dict[str, Callable[[int], Statistic]]:
        """Mean rank at every site."""
        return {"rank": MapRank}

    def score(self, view: GroupView) -> Tensor:
        """Mean rank."""
        return score_sites(view, "rank", lambda rank: rank.compute())
