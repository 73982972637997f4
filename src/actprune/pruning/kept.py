"""What the places of a network are given, kept, for several batches where that may be, until all of it is read at once."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import chain
from operator import attrgetter

import torch
from torch import Tensor

from actprune.core.hooks import Ear
from actprune.core.tensors import writes
from actprune.pruning.reads import Hand, Reads

TOGETHER = 8
"""Batches that are kept at once, at most."""
_KIND, _VERSION = attrgetter("shape", "dtype", "__class__"), attrgetter("_version")


@dataclass
class Place:
    """What is read with others, and how."""

    reads: Reads
    ear: Ear
    alone: Callable[[Tensor], object]
    """What the ear does where the place is read by itself."""
    shape: tuple[int, ...]
    """Of what is read, without samples."""
    dtype: torch.dtype
    hands: list[Hand]
    seen: list[Tensor] = field(default_factory=list)
    """What it was given, in one batch after the other; always the same list."""
    writes: list[int | None] = field(default_factory=list)
    """How often each had been written to until then, see ``writes``; empty where that is not asked."""

    def keep(self, x: Tensor) -> None:
        """It was given x."""
        self.seen.append(x)
        self.writes.append(None if x.is_inference() else x._version)  # as ``writes``, without a call

    def written(self, n_batches: int) -> set[int]:
        """Which of the things it was given, one in each of so many batches, are no longer as they were.

        Where PyTorch does not count writes, what lies in the same memory as what was given later is taken for it.
        """
        if len(self.writes) == len(self.seen):
            return {at for at, (x, before) in enumerate(zip(self.seen, self.writes, strict=True)) if writes(x) != before}
        addresses = list(map(Tensor.data_ptr, self.seen))
        return {at for at in range(n_batches) if addresses[at] in addresses[at + 1 :]}

    @property
    def space(self) -> int:
        """Positions of a map."""
        return math.prod(self.shape[1:])


@dataclass
class Launch:
    """What one kernel reads."""

    sources: Tensor
    widest: int
    dtype: torch.dtype
    is_mean: bool


class Chunk:
    """Places whose activations are kept at the same time.

    Args:
        places: in the order in which they are reached.
    """

    def __init__(self, places: list[Place]) -> None:
        self.places = places
        self.seen, self._writes = [place.seen for place in places], [place.writes for place in places]
        self.launches: list[Launch] = []
        self.is_read = False
        """Whether that was done for the present batch."""
        self._expected: dict[tuple[int, int], list[tuple[torch.Size, torch.dtype, type[Tensor]]]] = {}

    # few calls, most in C: between two batches nothing of this is in a CPU's cache

    def holds(self, n_batches: int) -> bool:
        """Whether each place was given one tensor in each batch, if it never was in one batch more than in another."""
        return set(map(len, self.seen)) == {n_batches}

    def given(self, n_samples: int, n_batches: int, device: torch.device) -> list[int] | None:
        """Where in memory lies what the places were given in the first batches, place after place.

        None if anything there is not as in the very first batch, or was written to since.
        """
        expected = self._expected.get((n_samples, n_batches))
        if expected is None:
            kinds = [(torch.Size((n_samples, *place.shape)), place.dtype, Tensor) for place in self.places]
            expected = self._expected[n_samples, n_batches] = [kind for kind in kinds for _ in range(n_batches)]
        is_all = self.holds(n_batches)
        kept = list(chain.from_iterable(self.seen if is_all else [seen[:n_batches] for seen in self.seen]))
        if (
            list(map(_KIND, kept)) != expected
            or not all(map(Tensor.is_contiguous, kept))
            or (device.index is not None and set(map(Tensor.get_device, kept)) != {device.index})
        ):
            return None
        addresses = list(map(Tensor.data_ptr, kept))
        before = list(chain.from_iterable(self._writes))
        if is_all and len(before) == len(kept):
            return addresses if _versions(kept) == before else None
        if is_all and not before and _distinct(addresses, n_batches):
            return addresses
        return None if any(place.written(n_batches) for place in self.places) else addresses

    def forget(self, which: slice = slice(None)) -> None:
        """Drop these of the things that each place keeps."""
        for place in self.places:
            del place.seen[which], place.writes[which]


class Proof:
    """Finds out how many batches may be kept: a place that is given the same memory again must be read before.

    Args:
        room: samples of which there may be everything.
    """

    def __init__(self, room: int) -> None:
        self._room = room
        self._kept: list[list[Tensor]] = []
        self._is_over = False

    def at_once(self, n_samples: int) -> int:
        """Batches of so many samples that may be kept."""
        return max(1, min(TOGETHER, self._room // n_samples)) if self._is_over and n_samples else 1

    def add(self, chunk: Chunk, n_samples: int) -> None:
        """Of one batch everything is kept, which is given up then; no batch was kept with another so far."""
        if self._is_over:
            return
        n = min(TOGETHER, self._room // max(1, n_samples))
        if n > 1:
            self._kept.append([seen[0] for seen in chunk.seen])
        if len(self._kept) >= n:
            addresses = [x.data_ptr() for each in zip(*self._kept, strict=True) for x in each]
            self._room = self._room if _distinct(addresses, len(self._kept)) else 0
            self._is_over = True
            self._kept.clear()

    def begin_again(self) -> None:
        """Hold nothing."""
        self._kept.clear()


def _versions(kept: list[Tensor]) -> list[int | None]:
    """``writes`` of each, in fewer calls."""
    try:
        return list(map(_VERSION, kept))
    except RuntimeError:  # of a tensor that was made under inference mode
        return list(map(writes, kept))


def _distinct(addresses: list[int], n: int) -> bool:
    """Whether of n addresses in a row no two are the same; of none, they are not."""
    if not n:
        return True
    return sum(map(len, map(set, zip(*[iter(addresses)] * n, strict=True)))) == len(addresses)
