"""What is known about tensors that somebody else keeps alive, by identity.

``torch.utils.weak.WeakTensorKeyDictionary`` does the same, but builds a Python object for every question. A trace asks
several times per tensor and operator, so that a concatenation of hundreds of tensors is mostly questions.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator
from typing import Generic, TypeVar

from torch import Tensor

Value = TypeVar("Value")


class ByTensor(Generic[Value]):
    """Tensor -> value; an entry goes when its tensor does, before another object can have the same ``id``."""

    def __init__(self) -> None:
        self._values: dict[int, Value] = {}
        self._alive: dict[int, weakref.ref[Tensor]] = {}

    def __len__(self) -> int:
        """Of how many tensors something is known."""
        return len(self._values)

    def __contains__(self, tensor: Tensor) -> bool:
        """Whether something is known about a tensor."""
        return id(tensor) in self._values

    def __setitem__(self, tensor: Tensor, value: Value) -> None:
        """Keep a value as long as the tensor lives."""
        key = id(tensor)
        self._values[key] = value
        if key not in self._alive:
            values, alive = self._values, self._alive

            def forget(_: object) -> None:
                values.pop(key, None)
                alive.pop(key, None)

            self._alive[key] = weakref.ref(tensor, forget)

    def get(self, tensor: Tensor) -> Value | None:
        """What is known about a tensor, or None."""
        return self._values.get(id(tensor))

    def each(self, tensors: Iterable[Tensor]) -> Iterator[Value | None]:
        """What is known about every one of many tensors."""
        return map(self._values.get, map(id, tensors))

    def pop(self, tensor: Tensor) -> Value | None:
        """The same, and forget it."""
        return self._values.pop(id(tensor), None)
