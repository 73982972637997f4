"""What the trace predicts of every operator's output: which class stands where along every dimension."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from actprune.graph.ids import FREE, Ids

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
        classes: Callable[[NDArray[np.int64]], NDArray[np.int64]],
    ) -> None:
        self._produced, self._classes = produced, classes
        self.numbers = numbers
        """Place -> the numbers that an operator computed with, if any: no cut changes them."""
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
        return Extents, (self._produced, self.numbers, self._classes)

    def _column(self, ids: Ids) -> NDArray[np.int64] | None:
        """Classes of ids; broadcast dimensions follow others and say nothing."""
        if ids is None:
            return None
        if id(ids) not in self._known:
            column = self._classes(ids)
            self._known[id(ids)] = column if (column >= 0).any() and not (ids == FREE).any() else None
        return self._known[id(ids)]
