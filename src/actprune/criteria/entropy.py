"""Entropy of a unit's activations, and of its ON/OFF state.

Formula: H(u) = -sum_b p_b ln p_b in nats, p_b = counts[u, b] / n; Miller-Madow adds (filled bins - 1) / (2 n), which
cancels the first-order bias of the plug-in estimate. State entropy: the same with two bins, on (a > 0) and off.
Source: Luo & Wu, arXiv:1706.05791; Miller 1955; ON/OFF: EASIER, arXiv:2404.18949.
Deviations: by default all positions count (not the pooled mean), zero has its own bin, and the units of a site share
one range; a range per unit makes the entropy blind to scale, in which a Gaussian unit scores the same whatever its
variance. Counts are accumulated over all batches; averaging the entropies of batches would be biased low. Positions of
one map are not independent, so n in Miller-Madow is optimistic.
Equivalent to: for Gaussian units in a common range, the rank of the variance.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from actprune.core.errors import ConfigError
from actprune.core.views import Criterion, GroupView, Statistic
from actprune.criteria.combine import score_sites
from actprune.statistics import Activity, Histogram

CORRECTIONS = ("none", "miller_madow")


def entropy(
    counts: Tensor,  # (..., B) counts
) -> Tensor:
    """Plug-in entropy over the last dimension, in nats."""
    shares = counts / counts.sum(-1, keepdim=True)
    return torch.special.entr(shares).sum(-1)


def miller_madow(
    counts: Tensor,  # (..., B) counts
) -> Tensor:
    """First-order bias of ``entropy``, to be added: (filled bins - 1) / (2 n), in nats."""
    return ((counts > 0).sum(-1) - 1) / (2 * counts.sum(-1))


@dataclass(frozen=True)
class Entropy(Criterion):
    """Entropy of the activation histogram; a unit that always says the same leaves first.

    Raises:
        ConfigError: an option is outside what it may be.
    """

    bins: int = 64
    """Bins between the least and the greatest activation."""
    range: str = "layer"
    """``layer``: all units of a site share one range; ``unit``: each has its own, the scale does not matter."""
    pool: str = "positions"
    """``positions``: every position counts; ``gap``: the mean of each map counts (Luo & Wu)."""
    zero_bin: bool = True
    """Exact zeros have a bin of their own."""
    bias_correction: str = "none"
    """``none`` or ``miller_madow``."""

    def __post_init__(self) -> None:
        """Check the options before any work is done."""
        if self.bias_correction not in CORRECTIONS:
            raise ConfigError(f"bias_correction={self.bias_correction!r} is not known; choose one of {', '.join(CORRECTIONS)}")
        self._histogram(1)

    def _histogram(self, n_units: int) -> Histogram:
        return Histogram(n_units, self.bins, self.range, self.pool, self.zero_bin)

    def statistics(self) -> dict[str, Callable[[int], Statistic]]:
        """One histogram per site."""
        return {"histogram": self._histogram}

    def score(self, view: GroupView) -> Tensor:
        """Entropy in nats."""
        return score_sites(view, "histogram", self._score)

    def _score(self, histogram: Statistic) -> Tensor:
        counts = histogram.compute()
        corrected = miller_madow(counts) if self.bias_correction == "miller_madow" else 0.0
        return entropy(counts) + corrected


@dataclass(frozen=True)
class StateEntropy(Criterion):
    """Entropy of on (a > 0) against off; a unit that is nearly always on, or off, leaves first."""

    def statistics(self) -> dict[str, Callable[[int], Statistic]]:
        """One count of states per site."""
        return {"activity": Activity}

    def score(self, view: GroupView) -> Tensor:
        """Entropy of the state in nats, at most ln 2."""
        return score_sites(view, "activity", self._score)

    @staticmethod
    def _score(activity: Statistic) -> Tensor:
        on = activity.compute()[:, 1]
        return entropy(torch.stack([on, 1 - on], dim=1))
