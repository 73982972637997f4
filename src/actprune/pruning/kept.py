"""What the places of a network are given in one batch, kept until all of it is read at once."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from itertools import chain
from operator import attrgetter
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from actprune.core.hooks import Ear
from actprune.pruning.reads import Hand, Reads

if TYPE_CHECKING:
    from actprune.statistics.kernels import Launch

_KIND = attrgetter("shape", "dtype", "__class__")


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
    """What it was given in this batch."""
    before: list[int | None] = field(default_factory=list)
    """How often each had been written to until then, see ``writes``."""

    def keep(self, x: Tensor) -> None:
        """It was given x."""
        self.seen.append(x)
        self.before.append(None if x.is_inference() else x._version)  # as ``writes``, without a call

    def clear(self) -> None:
        """Keep nothing."""
        self.seen.clear()
        self.before.clear()

    @property
    def is_written(self) -> bool:
        """Whether anything that is kept was written to since, as far as PyTorch counts."""
        return _is_written(self.seen, self.before)

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
        self.launches: list[Launch] = []
        """What kernels read."""
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
            and not _is_written(kept, chain.from_iterable(self._before))
        )
        return list(map(Tensor.data_ptr, kept)) if as_before else None

    def clear(self) -> None:
        """Keep nothing."""
        for seen in self._seen:
            seen.clear()
        for before in self._before:
            before.clear()


def _is_written(kept: list[Tensor], before: Iterable[int | None]) -> bool:
    return any(x._version != n for x, n in zip(kept, before, strict=True) if n is not None)
