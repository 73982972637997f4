"""Empirical Rademacher complexity of a unit: how well it can fit random signs on the observed samples.

Formulas, with a_i the unit's activation on sample i of n and fair signs sigma_i:

- ``linear``, the class {w a : |w| <= 1}: (1/n) E|sum_i sigma_i a_i|. Ranks as the root mean square of the a_i does.
- ``threshold``, the class {1[a >= t]} and, where ``symmetric``, its negatives:
  (1/n) E max_t |sum_{i: a_i >= t} sigma_i|. Scale-free: near 1.25 / sqrt(n) for a continuous unit, lower for one that
  is mostly zero. Without the negatives but with the empty set: (1/n) E max_t max(0, sum), near 0.80 / sqrt(n).
- ``layer``, the linear functions of all units of the site with norm 1: R = (1/n) E||sum_i sigma_i a_i||_2; the score is
  the unit's leave-one-out share, R minus R without the unit. To first order in a wide layer: its energy.

Estimates: Monte Carlo over the signs, or in closed form the upper bound of Jensen and Khinchine, in which E|.| is
replaced by sqrt(E .^2): ||a|| / n for ``linear`` and the difference of Frobenius norms for ``layer``; there is none for
``threshold``. The closed form is the default where it exists: 64 replicates have a relative error of 9 %, and behind
batch norms the scores of a layer's units may differ by little more (docs/criteria.md): much of their ranking would be noise.

No paper ranks units by these; the definitions are this project's. The threshold class depends on the activations only
through the sizes of groups of equal values: after sorting, the partial sums are a +-1 walk read off at those sizes. A
histogram is therefore enough, all units share the same walks, and thresholds inside a bin are merged (a lower bound).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from actprune.core.checks import is_whole
from actprune.core.errors import ConfigError
from actprune.core.views import Criterion, GroupView, Statistic
from actprune.criteria.combine import score_sites
from actprune.criteria.walks import threshold_complexity
from actprune.statistics import Histogram, LinearRademacher

CLASSES = ("linear", "threshold", "layer")
ESTIMATES = ("monte_carlo", "closed_form")
THRESHOLD_BINS = 64


@dataclass(frozen=True)
class Rademacher(Criterion):
    """A unit that cannot fit random signs leaves first.

    Raises:
        ConfigError: an option is outside what it may be, or the class has no closed form.
    """

    function_class: str = "linear"
    """``linear``, ``threshold`` or ``layer``."""
    estimate: str | None = None
    """``monte_carlo`` or ``closed_form``; None: the closed form where there is one."""
    pool: str = "gap"
    """``gap``: a_i is the mean of sample i's map; ``positions``: every position is a sample of its own."""
    replicates: int = 64
    """Draws of the signs for ``monte_carlo``."""
    seed: int = 0
    """Seed of the signs."""
    symmetric: bool = True
    """Whether the ``threshold`` class holds the negatives too; the other two always do."""

    def __post_init__(self) -> None:
        """Check the options before any work is done."""
        for name, value, known in (
            ("function_class", self.function_class, CLASSES),
            ("estimate", self.estimate, (None, *ESTIMATES)),
        ):
            if value not in known:
                raise ConfigError(f"{name}={value!r} is not known; choose one of {', '.join(k for k in known if k)}")
        if self.function_class == "threshold" and self.estimate == "closed_form":
            raise ConfigError("function_class='threshold' has no closed form; set estimate='monte_carlo'")
        if not (is_whole(self.replicates) and self.replicates >= 1):
            raise ConfigError(
                f"replicates={self.replicates} must be an integer of 1 or more; the relative error is 0.76 / sqrt(replicates)"
            )
        if not is_whole(self.seed):
            raise ConfigError(f"seed={self.seed!r} must be an integer")
        self._statistic(1)

    @property
    def _closed(self) -> bool:
        return self.function_class != "threshold" and self.estimate != "monte_carlo"

    def _statistic(self, n_units: int) -> Statistic:
        if self.function_class == "threshold":
            return Histogram(n_units, THRESHOLD_BINS, range="unit", pool=self.pool, zero_bin=True)
        replicates = 0 if self._closed else self.replicates
        return LinearRademacher(n_units, replicates, self.pool, self.seed)

    def statistics(self) -> dict[str, Callable[[int], Statistic]]:
        """Signed sums, or a histogram for the threshold class, at every site."""
        return {"rademacher": self._statistic}

    def score(self, view: GroupView) -> Tensor:
        """The complexity of each unit (``layer``: its share)."""
        return score_sites(view, "rademacher", getattr(self, f"_{self.function_class}"))

    def _linear(self, sums: LinearRademacher) -> Tensor:
        return sums.bounds()[1] if self._closed else sums.compute()

    def _layer(self, sums: LinearRademacher) -> Tensor:
        sums.check()
        energies = sums.squares.unsqueeze(0) if self._closed else sums.signed.square().T
        return leave_one_out(energies).mean(0) / sums.n_terms

    def _threshold(self, histogram: Histogram) -> Tensor:
        sizes = histogram.at_least()
        n = int(sizes[0].max())
        return threshold_complexity(sizes, n, self.replicates, self.seed, self.symmetric)


def leave_one_out(
    energies: Tensor,  # (M, U), squared length of every unit's part of M vectors
) -> Tensor:
    """What each unit adds to the length of the whole vector: sqrt(sum) - sqrt(sum without the unit), (M, U)."""
    whole = energies.sum(1, keepdim=True)
    without = (whole - energies).clamp(min=0)
    length = whole.sqrt() + without.sqrt()  # sqrt(a) - sqrt(b) = (a - b) / (sqrt(a) + sqrt(b)), without cancellation
    return torch.where(length > 0, energies / length, 0.0)
