"""How much the network's outputs move with what a unit says.

Formula, source and cost: see ``actprune.statistics.sensitivity`` (SeReNe, arXiv:2102.03773).
Deviation: read where the consumer reads, behind the activation function, where the paper has the pre-activation. Behind a ReLU
the two differ by the factor 1[p > 0]: a unit that is off is not insensitive here.
The lower bound sums the outputs before it takes the size. A network that is trained with cross entropy may add one number to
all its logits without any effect, and that is the direction which the sum sees: it is cheap, and may say little.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from actprune.core.views import Criterion, GroupView, Statistic
from actprune.criteria.combine import score_sites
from actprune.statistics import Sensitivity as SensitivityStatistic


@dataclass(frozen=True)
class Sensitivity(Criterion):
    """A unit that the outputs hardly notice leaves first.

    Raises:
        ConfigError: the mode is not known.
    """

    mode: str = "full"
    """``full``: one backward pass per output; ``lower_bound``: one in all."""

    def __post_init__(self) -> None:
        """Check the mode."""
        self._statistic(1)

    def _statistic(self, n_units: int) -> Statistic:
        return SensitivityStatistic(n_units, self.mode)

    def statistics(self) -> dict[str, Callable[[int], Statistic]]:
        """The mean sensitivity at every site."""
        return {"sensitivity": self._statistic}

    def score(self, view: GroupView) -> Tensor:
        """Mean sensitivity."""
        return score_sites(view, "sensitivity", lambda sensitivity: sensitivity.compute())
