"""Mean rank of a unit's feature maps.

Formula, source and cost: see ``actprune.statistics.rank`` (HRank, Lin et al., arXiv:2002.10179).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from actprune.core.views import Criterion, GroupView, Statistic
from actprune.criteria.combine import score_sites
from actprune.statistics import MapRank


@dataclass(frozen=True)
class HRank(Criterion):
    """A unit whose maps have low rank leaves first.

    Raises:
        ConfigError: ``shape`` is no two whole numbers above 0.
    """

    shape: Sequence[int] | None = None
    """(height, width) of the maps; None: they are square."""

    def __post_init__(self) -> None:
        """Check the shape before any work is done."""
        MapRank(1, self.shape)

    def statistics(self) -> dict[str, Callable[[int], Statistic]]:
        """Mean rank at every site."""
        return {"rank": lambda n_units: MapRank(n_units, self.shape)}

    def score(self, view: GroupView) -> Tensor:
        """Mean rank."""
        return score_sites(view, "rank", lambda rank: rank.compute())
