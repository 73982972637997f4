"""First and second moments of a unit's activations: mean activation, root mean square, variance.

Formula: |E a|, sqrt(E a^2), E (a - E a)^2 over all samples and positions.
Source: mean activation, Molchanov et al., arXiv:1611.06440; variance, e.g. VBP, arXiv:2507.12988.
Deviation: the absolute value of the mean, so that a unit that says -3 counts as one that says 3; after a ReLU the same.
Equivalent to: the root mean square ranks as the linear Rademacher complexity over positions does; the variance is what
remains of a unit's contribution when its mean is folded into the consumer's bias.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from actprune.core.views import Criterion, GroupView, Statistic
from actprune.criteria.combine import score_sites
from actprune.statistics import Moments


class _MomentCriterion(Criterion):
    """A function of mean and variance."""

    def statistics(self) -> dict[str, Callable[[int], Statistic]]:
        """The moments at every site."""
        return {"moments": Moments}

    def score(self, view: GroupView) -> Tensor:
        """The moment, in the activation's units (variance: squared)."""

        def of_site(moments: Statistic) -> Tensor:
            mean, variance = moments.compute().unbind(1)
            return self.of(mean, variance)

        return score_sites(view, "moments", of_site)

    @staticmethod
    @abstractmethod
    def of(mean: Tensor, variance: Tensor) -> Tensor:
        """Score from the mean and the variance, (U,) each."""


@dataclass(frozen=True)
class MeanActivation(_MomentCriterion):
    """Absolute mean activation."""

    @staticmethod
    def of(mean: Tensor, variance: Tensor) -> Tensor:
        """|E a|."""
        return mean.abs()


@dataclass(frozen=True)
class RMS(_MomentCriterion):
    """Root mean square activation."""

    @staticmethod
    def of(mean: Tensor, variance: Tensor) -> Tensor:
        """sqrt(E a^2)."""
        return (variance + mean.square()).sqrt()


@dataclass(frozen=True)
class Variance(_MomentCriterion):
    """Variance of the activation."""

    @staticmethod
    def of(mean: Tensor, variance: Tensor) -> Tensor:
        """E (a - E a)^2."""
        return variance
