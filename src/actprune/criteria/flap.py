"""Fluctuation: how much of what a consumer says varies because of a unit.

Formula: F(u) = Var(a_u) ||W_u||_F^2, with a_u the unit's activation over all samples and positions and W_u all weights of the
consumer that read it (outputs times kernel taps): the variance of the output that goes with the unit when its mean is folded
into a bias, were units and taps uncorrelated. Source: FLAP, An et al., arXiv:2312.11983.
Deviations: variance divided by n, not n - 1; one score per site, several sites combined as in ``combine``; the paper
standardises the scores of a layer, ``selection.normalise=standard`` here (the default divides by their mean). A unit that is
read at several channels (a head, or a map that was flattened) has one variance over all of them.
Equivalent to: variance, where the columns of all units have one norm. Sites that no layer's own weight reads are left out.
Cost: as variance, and one pass over the consumer's weights. Mergeable: by sum.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from actprune.core.views import Criterion, GroupView, Statistic
from actprune.criteria.reading import is_read, score_read
from actprune.statistics import Moments


@dataclass(frozen=True)
class FLAP(Criterion):
    """A unit whose fluctuation hardly reaches the consumer leaves first."""

    unscored = "no layer with a weight of its own reads them; choose another criterion, e.g. Variance()"

    def statistics(self) -> dict[str, Callable[[int], Statistic]]:
        """The moments at every site."""
        return {"moments": Moments}

    def may_score(self, view: GroupView) -> bool:
        """Whether a layer's own weight reads it."""
        return is_read(view)

    def score(self, view: GroupView) -> Tensor | None:
        """Variance times squared norm of the columns."""
        return score_read(view, "moments", lambda moments, weight: moments.compute()[:, 1] * weight.square().sum(1))
