"""Histogram of every unit's activations: the counts from which entropy is taken, once, after all batches.

Formula: counts[u, b] = number of (sample, position) pairs whose activation falls into bin b of the unit's range.
Source: Luo & Wu, arXiv:1706.05791 (entropy of global-average-pooled activations, equal bins between min and max).

Exact definition, and how it deviates: ``bins`` equal bins between the least and the greatest activation seen (of the
unit, or of all units of the site) need that range before the first batch. Counts are kept instead in 8 to 16 times
finer bins of dyadic width (see ``dyadic``), and each is given whole to the bin that holds its middle at the end: the
edges differ from Luo & Wu's by at most half a fine bin, 1/16 of a bin. A range narrower than 2^-16 of the magnitude is
rounding noise and fills one bin; up to about 2^-16 ``bins`` of it, fewer bins than asked for are told apart.

Cost: about eight cheap passes and one table increment per element. Memory: U x 16 bins int64. Mergeable: yes,
exactly.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from actprune.core.checks import is_whole
from actprune.core.errors import ConfigError
from actprune.core.tensors import sent
from actprune.statistics.base import Accumulator, check_pool
from actprune.statistics.dyadic import bin_index, columns, equal_bins, rebin, window

FINENESS = 16
_EXACT_FLOAT32 = 1 << 24
RANGES = ("layer", "unit")


Window = tuple[Tensor, Tensor]
"""Exponent and first bin, (..., 1) or (..., U)."""
Block = tuple[slice, Tensor, Tensor]
"""Units, and what ``bin_index`` takes for their columns."""


class Histogram(Accumulator):
    """Streaming histogram per unit over a range that need not be known in advance.

    Args:
        n_units: units of the group at this site (U).
        bins: bins between the least and the greatest value.
        range: ``"layer"``: one range for all units of the site, a unit that varies little has few filled bins;
            ``"unit"``: each unit's own range, so that the scale of a unit does not matter.
        pool: ``"positions"``: every position of a map counts; ``"gap"``: the mean of each map counts (global average
            pooling, Luo & Wu).
        zero_bin: count exact zeros in a bin of their own instead of the bin that begins at 0.

    Raises:
        ConfigError: ``bins`` outside [2, 65536], unknown ``range`` or ``pool``.
    """

    joinable = True
    counts: Tensor  # (U, fine bins) int64
    zeros: Tensor  # (U,) how many of them are exact zeros
    low: Tensor  # (1,) or (U,) least value seen; of S sites that were joined (S,)
    high: Tensor  # (1,) or (U,) greatest value seen

    def __init__(
        self, n_units: int, bins: int = 64, range: str = "layer", pool: str = "positions", zero_bin: bool = True
    ) -> None:
        super().__init__(n_units)
        if not (is_whole(bins) and 2 <= bins <= 65536):
            raise ConfigError(f"bins={bins} must be an integer in [2, 65536]; 16 to 256 are usual")
        if range not in RANGES:
            raise ConfigError(f"range={range!r} is not known; choose one of {', '.join(RANGES)}")
        check_pool(pool)
        self.bins, self.range, self.pool, self.zero_bin = bins, range, pool, zero_bin
        self.fine_bins = FINENESS * bins
        self.whole_maps = self.means_do = pool == "gap"  # the mean of a few positions is not the mean of the map
        self._sites: Tensor | None = None
        self._known: tuple[object, Window, dict[int, list[Block]]] | None = None
        extent = n_units if range == "unit" else 1
        self.add_state("counts", torch.zeros(n_units, self.fine_bins, dtype=torch.int64, device="cpu"), dist_reduce_fx="sum")
        self.add_state("zeros", torch.zeros(n_units, dtype=torch.float64, device="cpu"), dist_reduce_fx="sum")
        self.add_state("low", torch.full((extent,), torch.inf, dtype=torch.float64, device="cpu"), dist_reduce_fx="min")
        self.add_state("high", torch.full((extent,), -torch.inf, dtype=torch.float64, device="cpu"), dist_reduce_fx="max")

    def accumulate(self, x: Tensor, sample_ids: Tensor) -> Tensor:
        """Count one batch; the window follows the range."""
        if self.pool == "gap":
            x = x.mean(2, keepdim=True)
        rows = x.flatten(1)
        held = self._holds(rows, x.shape[2])
        witness, present = (self.low, self._window()) if held else self._follow(rows, x.shape[2])
        self._count(rows, x.shape[2], held, present)
        if self.zero_bin:
            self.zeros.add_(_per_unit(torch.eq(rows, 0, out=torch.empty_like(rows)).sum(0), x.shape[2]).sum(1))
        return witness

    def joined(self, sizes: Sequence[int]) -> None:
        """Remember which site each unit belongs to."""
        if self.range == "layer":
            units = torch.tensor(sizes, device="cpu")
            self._sites = sent(torch.arange(len(sizes), device="cpu").repeat_interleave(units), self.low.device)

    def _holds(self, rows: Tensor, positions: int) -> bool:
        """Whether all values are finite and inside the common range already; free to ask on a CPU only."""
        if self.range != "layer" or rows.device.type != "cpu":
            return False
        if self._sites is None:
            low, high = torch.aminmax(rows)
            return self.low.item() <= low.item() and high.item() <= self.high.item()
        low, high = (values.view(-1, positions) for values in (rows.amin(0), rows.amax(0)))
        known = (values[self._sites].unsqueeze(1) for values in (self.low, self.high))
        return bool((next(known) <= low).all() and (high <= next(known)).all())

    def _follow(self, rows: Tensor, positions: int) -> tuple[Tensor, Window]:
        """Take a batch into the range; (U,), finite where the unit's values are, and the present window."""
        # over samples first: reducing over two dimensions at once is many times slower
        low = _per_unit(rows.amin(0), positions).amin(1)
        high = _per_unit(rows.amax(0), positions).amax(1)
        witness = low + high  # finite float32 numbers cannot overflow in float64
        broken = ~torch.isfinite(witness)
        low, high = low.masked_fill(broken, torch.inf), high.masked_fill(broken, -torch.inf)
        if self._sites is not None:
            low = torch.full_like(self.low, torch.inf).scatter_reduce_(0, self._sites, low, "amin")
            high = torch.full_like(self.high, -torch.inf).scatter_reduce_(0, self._sites, high, "amax")
        elif self.range == "layer":
            low, high = low.amin(0, keepdim=True), high.amax(0, keepdim=True)
        return witness, self._widen(low, high)

    def _widen(self, low: Tensor, high: Tensor) -> Window:
        """Take [low, high] into the range and move the counts to the new window, which is returned."""
        if self.counts.device.type == "cpu":
            empty = bool((self.low > self.high).all())
            old = self._window()
            torch.minimum(self.low, low, out=self.low)
            torch.maximum(self.high, high, out=self.high)
            new = self._window()
            if empty or all(torch.equal(a, b) for a, b in zip(old, new, strict=True)):
                return new
        else:  # both windows at once; and whether anything moved is not asked, which would stall the device
            lows = torch.stack([self.low, torch.minimum(self.low, low)])
            highs = torch.stack([self.high, torch.maximum(self.high, high)])
            exponents, origins = self._each(window(lows, highs, self.fine_bins))
            old, new = (exponents[0], origins[0]), (exponents[1], origins[1])
            self.low.copy_(lows[1])
            self.high.copy_(highs[1])
        self.counts.copy_(rebin(self.counts, old, new))
        return new

    def _window(self) -> Window:
        """The window of the present range; on a CPU, kept while the range stays."""
        if self.counts.device.type != "cpu":
            return self._each(window(self.low, self.high, self.fine_bins))
        key = (self.low.tolist(), self.high.tolist())
        if self._known is None or self._known[0] != key:
            self._known = (key, self._each(window(self.low, self.high, self.fine_bins)), {})
        return self._known[1]

    def _each(self, bounds: Window) -> Window:
        """The windows of sites, for each of their units; along the last dimension."""
        return bounds if self._sites is None else (bounds[0][..., self._sites], bounds[1][..., self._sites])

    def _count(self, rows: Tensor, positions: int, inside: bool, present: Window) -> None:
        for units, scale, shift in self._blocks(positions, present):
            part = rows[:, units.start * positions : units.stop * positions]
            counts = self.counts[units].view(-1)
            index = bin_index(part, scale, shift)
            _increment(counts, index if inside else index.clamp_(0, len(counts) - 1))

    def _blocks(self, positions: int, present: Window) -> list[Block]:
        """Units that are counted together, and how their values become places; on a CPU, kept while the range stays."""
        exponent, origin = present
        kept = self._known[2] if self._known is not None and self.counts.device.type == "cpu" else {}
        if positions in kept:
            return kept[positions]
        size = max(1, _EXACT_FLOAT32 // 2 // self.fine_bins)  # so that every place in the counts is exact in float32
        blocks = []
        for start in range(0, self.n_units, size):
            units = slice(start, min(start + size, self.n_units))
            part = units if len(exponent) > 1 else slice(None)
            first = torch.arange(units.stop - start, device=exponent.device) * self.fine_bins
            blocks.append((units, *columns(exponent[part], origin[part], first, positions)))
        kept[positions] = blocks
        return blocks

    def evaluate(self) -> Tensor:
        """Counts per unit and bin.

        Returns:
            Float64 tensor (U, bins), or (U, 1 + bins) with the exact zeros first.
        """
        zeros = self.zeros if self.zero_bin else None
        return equal_bins(self.counts, zeros, self._window(), self.low, self.high, self.bins)

    def at_least(self) -> Tensor:
        """How many values are >= every fine edge, and (last column, where zeros are counted) how many are > 0.

        Returns:
            Float64 tensor (U, 16 bins) or (U, 16 bins + 1).
        """
        self.check()
        sizes = self.counts.flip(1).cumsum(1).flip(1).double()
        if not self.zero_bin:
            return sizes
        _, origin = self._window()
        home = (-origin).view(-1, 1).expand(self.n_units, 1)
        # Where 0 lies outside the window there are no zeros, and any column serves: a size that is there already.
        positive = sizes.gather(1, home.clamp(0, self.fine_bins - 1)) - self.zeros.unsqueeze(1)
        return torch.cat([sizes, positive], dim=1)

    def scale(self) -> dict[str, Tensor]:
        """The range, as two maxima."""
        return {"high": self.high, "minus_low": -self.low}

    def aligned(self, shared: Mapping[str, Tensor]) -> None:
        """Move the counts to the window of the range of all shards."""
        self._widen(-shared["minus_low"], shared["high"])


def _per_unit(
    x: Tensor,  # (U P,)
    positions: int,
) -> Tensor:
    """One row per unit, float64 (U, P)."""
    return x.view(-1, positions).double()


def _increment(
    counts: Tensor,  # (K,) int64, changed in place
    index: Tensor,  # (...) int32 in [0, K)
) -> None:
    if index.device.type == "cpu":
        counts += torch.bincount(index.flatten(), minlength=len(counts))
    else:  # bincount reads the largest index back to the host
        flat = index.flatten().long()
        counts.scatter_add_(0, flat, torch.ones(1, dtype=counts.dtype, device=counts.device).expand_as(flat))
