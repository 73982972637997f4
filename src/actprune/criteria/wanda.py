"""Weights and activations: the size of what a unit sends through its consumer's weights.

Formula: W(u) = sum_{o,t} |w_out| rms(a_u), over outputs o and kernel taps t, the sum of Wanda's per-weight score |w| ||a||_2
over all weights of the consumer that read the unit; ||a||_2 / sqrt(n) in place of ||a||_2, which changes no ranking.
Source: Wanda, Sun et al., arXiv:2306.11695, per weight; summed over a structure as in the structured variant that
arXiv:2312.11983 compares with (Wanda-sp).
Deviations: one score per site, several sites combined as in ``combine``. A unit that is read at several channels has one root
mean square over all of them. Sites that no layer's own weight reads are left out.
Equivalent to: root mean square, where the columns of all units have one L1 norm.
Cost: as rms, and one pass over the consumer's weights. Mergeable: by sum.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from actprune.core.views import Criterion, GroupView, Statistic
from actprune.criteria.reading import is_read, score_read
from actprune.statistics import Moments


@dataclass(frozen=True)
class Wanda(Criterion):
    """A unit that sends little through its consumer's weights leaves first."""

    unscored = "no layer with a weight of its own reads them; choose another criterion, e.g. RMS()"

    def statistics(self) -> dict[str, Callable[[int], Statistic]]:
        """The moments at every site."""
        return {"moments": Moments}

    def may_score(self, view: GroupView) -> bool:
        """Whether a layer's own weight reads it."""
        return is_read(view)

    def score(self, view: GroupView) -> Tensor | None:
        """L1 norm of the columns times root mean square."""

        def of_site(moments: Statistic, weight: Tensor) -> Tensor:
            mean, variance = moments.compute().unbind(1)
            return weight.abs().sum(1) * (variance + mean.square()).sqrt()

        return score_read(view, "moments", of_site)
