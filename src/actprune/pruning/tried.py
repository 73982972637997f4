"""The first batch: each place is read as it comes, and it is found out whether what it was given stays as it was."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from actprune.core.tensors import writes
from actprune.pruning.kept import Chunk, Place

_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass
class _Trial:
    place: Place
    x: Tensor
    bits: Tensor
    """Sums of x's bits at that time: not every write is counted, nor does every one change what is read of few samples."""
    writes: int | None


class Trials:
    """Places that hold what they were given until it is compared.

    Args:
        may_be: whether a place may be read with others.
    """

    def __init__(self, may_be: Callable[[Place], bool]) -> None:
        self._may_be = may_be
        self._trials: list[_Trial] = []
        self.kept = 0
        """Bytes."""

    def add(self, place: Place, x: Tensor) -> None:
        """A place was given x, contiguous, and has read it."""
        self._trials.append(_Trial(place, x, _bits(x), writes(x)))
        self.kept += x.numel() * x.element_size()

    def clear(self) -> None:
        """Hold nothing."""
        self._trials, self.kept = [], 0

    def chunk(self) -> Chunk | None:
        """The places of which everything is as it was given, in one chunk; None where there are none. Holds nothing then."""
        trials = [trial for trial in self._trials if self._may_be(trial.place)]
        self.clear()
        if not trials:
            return None
        changed = _changed([trial.bits for trial in trials], [_bits(trial.x) for trial in trials])
        changed |= {k for k, trial in enumerate(trials) if writes(trial.x) != trial.writes}
        return Chunk([trial.place for k, trial in enumerate(trials) if k not in changed])


def _bits(x: Tensor) -> Tensor:
    """Sums of the bits of every so manieth element, int64, at most 4,096 of them: NaN equals itself, and what moves shows."""
    bits = x.detach().view(_INTEGERS[x.element_size()])
    return bits.view(-1, math.gcd(bits.numel(), 1 << 12)).sum(0)


def _changed(before: list[Tensor], after: list[Tensor]) -> set[int]:
    """Which of several tensors are not what they were; the host waits once for all of them."""
    ends = torch.tensor([len(bits) for bits in before], device="cpu").cumsum(0)
    differ = (torch.cat(before) != torch.cat(after)).nonzero().flatten().cpu()
    return set(torch.bucketize(differ, ends, right=True).tolist())
