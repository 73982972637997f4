"""What the places of a network are given in one batch, kept until all of it is read at once."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import chain, repeat
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor

from actprune.core.hooks import Ear
from actprune.core.tensors import writes
from actprune.pruning.reads import Hand, Reads

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
    is_counted: bool
    """Whether PyTorch counts who writes to what it is given under inference mode, too: that was made outside."""
    seen: list[Tensor] = field(default_factory=list)
    """What it was given in this batch."""
    before: list[int | None] = field(default_factory=list)
    """How often each had been written to until then, see ``writes``; empty where nothing is counted."""

    def keep(self, x: Tensor) -> None:
        """It was given x."""
        self.seen.append(x)
        self.before.append(None if x.is_inference() else x._version)  # as ``writes``, without a call

    def keeper(self, inference: bool) -> Callable[[Tensor], object]:
        """What keeps what it is given: without a call in Python where there is nothing to count."""
        return self.seen.append if inference and not self.is_counted else self.keep

    def clear(self) -> None:
        """Keep nothing."""
        self.seen.clear()
        self.before.clear()

    @property
    def is_written(self) -> bool:
        """Whether anything that is kept was written to since, as far as PyTorch counts, or ever if nobody counted."""
        before = self.before or repeat(0)
        return any(writes(x) not in (None, n) for x, n in zip(self.seen, before, strict=False))

    @property
    def space(self) -> int:
        """Positions of a map."""
        return math.prod(self.shape[1:])


class Chunk:
    """Places whose activations are kept at the same time.

    Args:
        places: in the order in which they are reached.
    """

    def __init__(self, places: list[Place]) -> None:
        self.places = places
        self._seen, self._before = [place.seen for place in places], [place.before for place in places]
        self.launches: list[Any] = []
        """What kernels read, see ``statistics.kernels``."""
        self.is_read = False
        """Whether that was done for the present batch."""
        self._expected: tuple[int, list[tuple[torch.Size, torch.dtype, type[Tensor]]]] = (0, [])

    @property
    def is_empty(self) -> bool:
        """Whether no place keeps anything."""
        return not any(self._seen)

    def given(self, n_samples: int, device: torch.device) -> list[int] | None:
        """Where in memory lies what each place was given.

        None unless each was given one tensor like that of the first batch, to which nobody has written since.
        """
        if self._expected[0] != n_samples:
            kinds = [(torch.Size((n_samples, *place.shape)), place.dtype, Tensor) for place in self.places]
            self._expected = n_samples, kinds
        # few calls, most in C: between two batches nothing of this is in a CPU's cache
        try:
            kept = [x for (x,) in self._seen]
        except ValueError:
            return None
        as_before = (
            list(map(_KIND, kept)) == self._expected[1]
            and all(map(Tensor.is_contiguous, kept))
            and (device.index is None or set(map(Tensor.get_device, kept)) == {device.index})
            and self._is_unwritten(kept)
        )
        return list(map(Tensor.data_ptr, kept)) if as_before else None

    def _is_unwritten(self, kept: list[Tensor]) -> bool:
        """Whether nobody wrote to what each place was given."""
        uncounted = list(map(Tensor.is_inference, kept))
        if all(uncounted):
            return True
        if not any(uncounted):
            return list(map(_VERSION, kept)) == list(chain.from_iterable(self._before))
        counted = (place for place, free in zip(self.places, uncounted, strict=True) if not free)
        return not any(place.is_written for place in counted)

    def clear(self) -> None:
        """Keep nothing."""
        for seen in self._seen:
            seen.clear()
        for before in self._before:
            before.clear()
