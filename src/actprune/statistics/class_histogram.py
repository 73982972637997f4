"""Histogram of every unit's activations, apart for every class of samples: what the unit says, and of which class.

Formula: counts[u, c, b] = number of activations of samples of class c that fall into bin b of the unit's range, which all
classes share. Bins, ranges and exactness are those of ``histogram``.

Cost: about six passes and one table increment per element. Memory: U x classes x 16 bins int64. Mergeable: yes, exactly.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from actprune.core.checks import is_whole
from actprune.core.errors import ConfigError, ObservationError
from actprune.statistics.base import Accumulator, check_pool
from actprune.statistics.dyadic import equal_bins, power_of_two, rebin, window
from actprune.statistics.histogram import FINENESS, RANGES


class ClassHistogram(Accumulator):
    """Streaming histogram per unit and class over a range that need not be known in advance.

    Args:
        n_units: units of the group at this site (U).
        classes: how many classes there are (K); labels are 0 .. K - 1.
        bins: bins between the least and the greatest value.
        range: ``"unit"``: each unit's own range; ``"layer"``: one range for all units of the site.
        pool: ``"gap"``: the mean of each map counts; ``"positions"``: every position of it, with the label of its sample.
        zero_bin: count exact zeros in a bin of their own instead of the bin that begins at 0.

    Raises:
        ConfigError: ``classes`` below 1, ``bins`` outside [2, 65536], unknown ``range`` or ``pool``.
    """

    needs_labels = True
    counts: Tensor  # (U K, fine bins) int64
    zeros: Tensor  # (U K,) how many of them are exact zeros
    outside: Tensor  # () samples whose label is no class
    low: Tensor  # (1,) or (U,) least value seen
    high: Tensor  # (1,) or (U,) greatest value seen

    def __init__(
        self,
        n_units: int,
        classes: int = 10,
        bins: int = 16,
        range: str = "unit",
        pool: str = "gap",
        zero_bin: bool = True,
    ) -> None:
        super().__init__(n_units)
        if not (is_whole(classes) and classes >= 1):
            raise ConfigError(f"classes={classes} must be an integer of at least 1; use the number of classes of the data")
        if not (is_whole(bins) and 2 <= bins <= 65536):
            raise ConfigError(f"bins={bins} must be an integer in [2, 65536]; 8 to 64 are usual")
        if range not in RANGES:
            raise ConfigError(f"range={range!r} is not known; choose one of {', '.join(RANGES)}")
        check_pool(pool)
        self.classes, self.bins, self.range, self.pool, self.zero_bin = classes, bins, range, pool, zero_bin
        self.fine_bins = FINENESS * bins
        self.whole_maps = self.means_do = pool == "gap"  # the mean of a few positions is not the mean of the map
        extent, rows = n_units if range == "unit" else 1, n_units * classes
        self.add_state("counts", torch.zeros(rows, self.fine_bins, dtype=torch.int64, device="cpu"), dist_reduce_fx="sum")
        self.add_state("zeros", torch.zeros(rows, dtype=torch.float64, device="cpu"), dist_reduce_fx="sum")
        self.add_state("outside", torch.zeros((), dtype=torch.float64, device="cpu"), dist_reduce_fx="sum")
        self.add_state("low", torch.full((extent,), torch.inf, dtype=torch.float64, device="cpu"), dist_reduce_fx="min")
        self.add_state("high", torch.full((extent,), -torch.inf, dtype=torch.float64, device="cpu"), dist_reduce_fx="max")

    def accumulate(self, x: Tensor, sample_ids: Tensor) -> Tensor:
        """Count one batch; ``sample_ids`` are the labels."""
        if self.pool == "gap":
            x = x.mean(2, keepdim=True)
        low, high = x.amin((0, 2)).double(), x.amax((0, 2)).double()
        witness = low + high  # finite float32 numbers cannot overflow in float64
        broken = ~torch.isfinite(witness)
        low, high = low.masked_fill(broken, torch.inf), high.masked_fill(broken, -torch.inf)
        if self.range == "layer":
            low, high = low.amin(0, keepdim=True), high.amax(0, keepdim=True)
        self._widen(low, high)
        labels = sample_ids.long().clamp(0, self.classes - 1)
        self.outside += (labels != sample_ids).sum()
        exponent, origin = (part.view(-1, 1) for part in window(self.low, self.high, self.fine_bins))
        place = (
            (x.double() * power_of_two(-exponent)).floor_().sub_(origin).nan_to_num_(0.0).clamp_(0, self.fine_bins - 1).long()
        )
        units = torch.arange(self.n_units, device=x.device)
        rows = units * self.classes + labels.unsqueeze(1)  # (N, U)
        index = (place + (rows * self.fine_bins).unsqueeze(2)).flatten()
        self.counts.view(-1).scatter_add_(0, index, torch.ones(1, dtype=torch.int64, device=x.device).expand_as(index))
        if self.zero_bin:
            self.zeros.scatter_add_(0, rows.flatten(), (x == 0).sum(2, dtype=torch.float64).flatten())
        return witness

    def _widen(self, low: Tensor, high: Tensor) -> None:
        """Take [low, high] into the range and move the counts to the new window."""
        old = self._bounds()
        torch.minimum(self.low, low, out=self.low)
        torch.maximum(self.high, high, out=self.high)
        new = self._bounds()
        # Whether anything moved is free to ask on a CPU; on a device the question would stall it, the work does not.
        if self.counts.device.type != "cpu" or not all(torch.equal(a, b) for a, b in zip(old, new, strict=True)):
            self.counts.copy_(rebin(self.counts, old, new))

    def _bounds(self) -> tuple[Tensor, Tensor]:
        """The window, one per row of counts where units have their own."""
        return window(self._per_row(self.low), self._per_row(self.high), self.fine_bins)

    def _per_row(self, x: Tensor) -> Tensor:
        return x.repeat_interleave(self.classes) if self.range == "unit" else x

    def check(self) -> None:
        """Raise as well where a label was no class."""
        super().check()
        if self.outside > 0:
            raise ObservationError(
                f"{int(self.outside)} of {int(self.n_samples)} samples have a label outside [0, {self.classes}): set "
                "classes= to the number of classes"
            )

    def evaluate(self) -> Tensor:
        """Counts per unit, class and bin.

        Returns:
            Float64 tensor (U, K, bins), or (U, K, 1 + bins) with the exact zeros first.
        """
        zeros = self.zeros if self.zero_bin else None
        low, high = self._per_row(self.low), self._per_row(self.high)
        return equal_bins(self.counts, zeros, self._bounds(), low, high, self.bins).unflatten(0, (self.n_units, self.classes))

    def scale(self) -> dict[str, Tensor]:
        """The range, as two maxima."""
        return {"high": self.high, "minus_low": -self.low}

    def aligned(self, shared: Mapping[str, Tensor]) -> None:
        """Move the counts to the window of the range of all shards."""
        self._widen(-shared["minus_low"], shared["high"])
