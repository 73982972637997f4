"""First-order effect of a unit on the loss.

Formula, source and cost: see ``actprune.statistics.taylor`` (Molchanov et al., arXiv:1906.10771, gates): the mean over samples
of (sum over positions of a dL/da)^2, with L the sample's own loss.
Deviations: the gate sits where the consumer reads, not behind the batch norm; gradients are those of the network in evaluation
mode on the observed batches, not collected while it trains. Several sites are combined as in ``combine``. The loss is taken for
a mean over the batch's samples, so that scores do not depend on the batch size.
Equivalent to: nothing of the activations alone; at a minimum of the loss it measures the noise of the gradient.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from actprune.core.views import Criterion, GroupView, Statistic
from actprune.criteria.combine import score_sites
from actprune.statistics import GateTaylor


@dataclass(frozen=True)
class Taylor(Criterion):
    """A unit without which the loss stays the same, to first order, leaves first."""

    def statistics(self) -> dict[str, Callable[[int], Statistic]]:
        """The squared gate gradient at every site."""
        return {"taylor": GateTaylor}

    def score(self, view: GroupView) -> Tensor:
        """Mean squared gate gradient."""
        return score_sites(view, "taylor", lambda taylor: taylor.compute())
