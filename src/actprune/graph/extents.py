"""What the trace predicts of every operator: which class stands where along every dimension, and what no cut changes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from actprune.graph.ids import FREE, Ids
from actprune.graph.told import Read, Told

Place: TypeAlias = tuple[str, int, int]
"""(module, call, operator)."""
Dims: TypeAlias = "tuple[NDArray[np.int64] | None, ...]"
"""Class of every position of every dimension, None where nothing is known to leave."""


class Extents(Mapping[Place, tuple[str, tuple[Dims, ...]]]):
    """Place -> the operator's name, and the dimensions of each of its outputs.

    Looked up when asked for: a cut that is only planned asks for none, and in a dense chain there are n^2 of them.
    """

    def __init__(
        self,
        produced: Mapping[Place, tuple[str, Sequence[Sequence[Ids]]]],
        numbers: Mapping[Place, tuple[float | complex, ...]],
        lengths: Mapping[Place, tuple[tuple[int, ...] | None, ...]],
        skipped: Mapping[Place, Ids],
        means: Mapping[Place, int],
        told: Mapping[Read, Told],
        classes: Callable[[NDArray[np.int64]], NDArray[np.int64]],
    ) -> None:
        self._produced, self._skipped, self._told, self._classes = produced, skipped, told, classes
        self.numbers = numbers
        """Place -> the numbers that an operator computed with, if any: no cut changes them."""
        self.lengths = lengths
        """Place -> the shape of each output; None: nothing is known of it."""
        self.means = means
        """Place -> how many were summed in what an operator divides by their number, where that has to follow."""
        self._known: dict[int, NDArray[np.int64] | None] = {}

    def __getitem__(self, place: Place) -> tuple[str, tuple[Dims, ...]]:
        """What one operator produced."""
        name, outputs = self._produced[place]
        return name, tuple(tuple(self._column(ids) for ids in dims) for dims in outputs)

    def __iter__(self) -> Iterator[Place]:
        """Places in order of execution."""
        return iter(self._produced)

    def __len__(self) -> int:
        """Number of operators."""
        return len(self._produced)

    def __reduce__(self) -> Any:
        """A copy looks everything up anew: what is known is known by identity."""
        return Extents, (self._produced, self.numbers, self.lengths, self._skipped, self.means, self._told, self._classes)

    def fixed(self, place: Place) -> Iterator[tuple[int, int, int]]:
        """Yield (output, dimension, extent) of every dimension that no cut changes."""
        outputs = self._produced[place][1]
        for number, (dims, shape) in enumerate(zip(outputs, self.lengths[place], strict=True)):
            for dim, (ids, extent) in enumerate(zip(dims, shape or (), strict=False)):
                if ids is None:
                    yield number, dim, extent

    def counts_skipped(self, place: Place) -> bool:
        """Whether a window's numbers are positions among what is cut, and not the same in every cut."""
        return place in self._skipped

    def skipped(self, place: Place) -> NDArray[np.int64] | None:
        """Classes of the positions before such a window; None where that is not known."""
        ids = self._skipped[place]
        return None if ids is None or (ids == FREE).any() else self._classes(ids)

    def told(self, read: Read, stays: NDArray[np.bool_]) -> tuple[list[Tensor], bool]:
        """The values that the trace has read there, of what stays; none if unknown. And whether some leave."""
        found, leaves = [], False
        told = self._told.get(read)
        for value, dims in zip(told.values, told.ids, strict=True) if told is not None else ():
            for dim, ids in enumerate(dims):
                if (column := self._column(ids)) is not None and not stays[column].all():
                    index = torch.from_numpy(np.flatnonzero(stays[column])).to(value.device)
                    value, leaves = value.index_select(dim, index), True
            found.append(value)
        return found, leaves

    def forget(self) -> None:
        """Keep no values any more: the rehearsal that is told them is over."""
        self._told = {}

    def _column(self, ids: Ids) -> NDArray[np.int64] | None:
        """Classes of ids; broadcast dimensions follow others and say nothing."""
        if ids is None:
            return None
        if id(ids) not in self._known:
            column = self._classes(ids)
            self._known[id(ids)] = column if (column >= 0).any() and not (ids == FREE).any() else None
        return self._known[id(ids)]
