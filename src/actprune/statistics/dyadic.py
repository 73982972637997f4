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
MIN_EXPONENT = -120


def power_of_two(exponent: Tensor) -> Tensor:
    """2^exponent as float64, exact (``exp2`` and ``ldexp`` may round), for int64 exponents in [-1022, 1023]."""
    return ((exponent + 1023) << 52).view(torch.float64)


def window(
    low: Tensor,  # (R,) float64, least value of each range; +inf when nothing was seen
    high: Tensor,  # (R,) float64, greatest value
    n_bins: int,
) -> tuple[Tensor, Tensor]:
    """Exponent and first bin of the smallest window that holds [low, high].

    Returns:
        (exponent, origin), int64 tensors (R,); a range that saw nothing is taken as [0, 0].
    """
    empty = low > high
    low, high = torch.where(empty, 0.0, low), torch.where(empty, 0.0, high)
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
    return torch.where(x > 0, torch.frexp(x).exponent.long(), MIN_EXPONENT).clamp(min=MIN_EXPONENT)


def bin_index(
    x: Tensor,  # (N, U, P) float32
    exponent: Tensor,  # (R,) int64, R = 1 or U
    origin: Tensor,  # (R,) int64
    n_bins: int,
) -> Tensor:
    """Position in the window of every value, as whole float32 numbers in [0, n_bins); exact for finite values inside.

    NaN and Inf get some position, so that they cannot write outside the counts; they are reported elsewhere.
    """
    scale = power_of_two(-exponent).float().view(-1, 1)
    return (x * scale).floor_().sub_(origin.float().view(-1, 1)).nan_to_num_(0.0).clamp_(0, n_bins - 1)


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
