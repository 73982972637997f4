"""Windows of equal bins whose width is a power of two: streaming histograms that forget nothing.

Bin number j of exponent e is [j 2^e, (j + 1) 2^e): the bins of e + 1 are unions of two bins of e. A window is the
smallest exponent at which ``n_bins`` consecutive bins hold everything in [low, high], starting at low's bin; it is a
function of (low, high) alone and its exponent never falls as the range grows. Counts that were binned in an earlier,
finer window are therefore moved to the present one *exactly*: the final counts equal those of binning all the data at
the end, whatever the order and size of the batches, and the counts of shards can be added after alignment.

Two floors of the exponent: 2^-RELATIVE_BITS times the largest magnitude, so that the rounding noise of a constant unit
does not count as variation, and MIN_EXPONENT, which keeps 2^-e inside float32.
"""

from __future__ import annotations

import torch
from torch import Tensor

RELATIVE_BITS = 16
"""With 20 every fourth constant unit behind a linear layer would vary, with 16 one in a hundred: see docs/criteria.md."""
MIN_EXPONENT = -120


def power_of_two(exponent: Tensor) -> Tensor:
    """2^exponent as float64, exact (``exp2`` and ``ldexp`` may round), for int64 exponents in [-1022, 1023]."""
    return ((exponent + 1023) << 52).view(torch.float64)


def window(
    low: Tensor,  # (..., R) float64, least value of each range; +inf when nothing was seen
    high: Tensor,  # (..., R) float64, greatest value
    n_bins: int,
) -> tuple[Tensor, Tensor]:
    """Exponent and first bin of the smallest window that holds [low, high].

    Returns:
        (exponent, origin), int64 tensors (..., R); a range that saw nothing is taken as [0, 0].
    """
    empty = low > high
    low, high = low.masked_fill(empty, 0.0), high.masked_fill(empty, 0.0)  # where() with a number would stall a device
    guess = _magnitude((high - low) / n_bins)
    exponent = guess + 1
    for candidate in (guess, guess - 1):  # frexp fixes the answer to within one; the bins that are touched decide
        scale = power_of_two(-candidate)
        fits = (high * scale).floor() - (low * scale).floor() < n_bins
        exponent = torch.where(fits, candidate, exponent)
    noise = _magnitude(torch.maximum(low.abs(), high.abs())) - RELATIVE_BITS
    exponent = torch.maximum(exponent, noise).clamp(min=MIN_EXPONENT)
    return exponent, (low * power_of_two(-exponent)).floor().long()


def _magnitude(x: Tensor) -> Tensor:
    """The least integer m with x < 2^m, for x >= 0; MIN_EXPONENT where that is less, and for 0."""
    return torch.frexp(x).exponent.long().masked_fill(x <= 0, MIN_EXPONENT).clamp(min=MIN_EXPONENT)


def columns(
    exponent: Tensor,  # (R,) int64, R = 1 or U
    origin: Tensor,  # (R,) int64
    first: Tensor,  # (U,) int64, where the window of each unit begins
    positions: int,
) -> tuple[Tensor, Tensor]:
    """What ``bin_index`` multiplies and adds, (1,) or (U positions,) and (U positions,) float32: one per column of its rows."""
    scale, shift = power_of_two(-exponent).float(), (first - origin).float()
    return (scale if len(scale) == 1 else scale.repeat_interleave(positions)), shift.repeat_interleave(positions)


def bin_index(
    x: Tensor,  # (N, U P) float32
    scale: Tensor,
    shift: Tensor,
) -> Tensor:
    """Bin of every value, counted from where its unit's window begins, int32 (N, U P); exact for finite values up to 2^24.

    NaN and Inf get some number: clamp it before it is used as an index.
    """
    return (x * scale).floor_().add_(shift).to(torch.int32)


def rebin(
    counts: Tensor,  # (U, n_bins) int64 in the old window
    old: tuple[Tensor, Tensor],  # exponent and origin, (R,) int64, R = 1 or U
    new: tuple[Tensor, Tensor],  # at an exponent that is not smaller
) -> Tensor:
    """Move counts to a window that holds the old range; exact."""
    n_bins = counts.shape[1]
    shift = (new[0] - old[0]).clamp(min=0).view(-1, 1)
    bins = old[1].view(-1, 1) + torch.arange(n_bins, device=counts.device)
    # Bins outside the old range are empty and may fall outside the new window: where they land does not matter.
    target = ((bins >> shift) - new[1].view(-1, 1)).clamp_(0, n_bins - 1)
    return torch.zeros_like(counts).scatter_add_(1, target.expand_as(counts), counts)


def equal_bins(
    counts: Tensor,  # (U, n_fine) int64 in the window
    zeros: Tensor | None,  # (U,) how many of them are exact zeros, if those are to have a bin of their own
    bounds: tuple[Tensor, Tensor],  # exponent and origin of the window, (R,) int64, R = 1 or U
    low: Tensor,  # (R,) least value
    high: Tensor,  # (R,) greatest value
    n_bins: int,
) -> Tensor:
    """Counts in ``n_bins`` equal bins of [low, high]: each fine bin goes whole to the bin that holds its middle.

    Returns:
        Float64 tensor (U, n_bins), or (U, 1 + n_bins) with the exact zeros first.
    """
    (units, n_fine), device = counts.shape, counts.device
    exponent, origin = (part.view(-1, 1) for part in bounds)
    width, low = power_of_two(exponent), low.view(-1, 1)
    spread = high.view(-1, 1) - low
    middle = (origin + torch.arange(n_fine, device=device) + 0.5) * width
    place = torch.where(spread > width, (middle - low) * n_bins / spread, 0.0)
    target = place.floor().long().clamp(0, n_bins - 1).expand(units, -1)
    result = torch.zeros(units, n_bins, dtype=torch.float64, device=device)
    result.scatter_add_(1, target, counts.double())
    if zeros is None:
        return result
    home = (-origin).clamp(0, n_fine - 1).expand(units, 1)
    result.scatter_add_(1, target.gather(1, home), -zeros.unsqueeze(1))
    return torch.cat([zeros.unsqueeze(1), result], dim=1)
