"""Channel ids: integers that name what leaves together, tied by union-find.

Every dimension of a tensor carries an integer array, one id per position. Two values are not ids: ``FIXED`` (the position
cannot be cut) and ``FREE`` (the position was broadcast, so it follows whatever it meets). ``None`` stands for a dimension
that is ``FIXED`` throughout. Union-find: Tarjan 1975; here vectorised over arrays, smallest id as the root.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from operator import is_
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

Ids: TypeAlias = "NDArray[np.int64] | None"

FIXED = -1
FREE = -2


class IdSpace:
    """Allocates ids, ties them and locks them with a reason."""

    def __init__(self) -> None:
        self._parent = _own_parents(1024)
        self._size = 0
        self.locks: list[tuple[NDArray[np.int64], str]] = []
        """(ids, reason), in the order in which they were given."""

    def __len__(self) -> int:
        """How many ids there are."""
        return self._size

    def copy(self) -> IdSpace:
        """A space of its own with the same ids, ties and locks."""
        twin = IdSpace()
        twin._parent, twin._size, twin.locks = self._parent.copy(), self._size, list(self.locks)
        return twin

    def fresh(self, n: int) -> NDArray[np.int64]:
        """Return ``n`` new ids."""
        start, self._size = self._size, self._size + n
        if self._size > len(self._parent) - 2:
            parent = _own_parents(2 * self._size)
            parent[:start] = self._parent[:start]
            self._parent = parent
        return np.arange(start, self._size, dtype=np.int64)

    def find(self, ids: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the root of every id (``FIXED`` and ``FREE`` stay as they are)."""
        roots = self._parent[ids]
        while not ((up := self._parent[roots]) == roots).all():
            roots = up
        self._parent[ids] = roots
        return roots

    def tie(self, a: Ids, b: Ids, reason: str) -> None:
        """Make ``a[i]`` and ``b[i]`` leave together; an id that meets ``FIXED`` is locked with ``reason``."""
        if a is None and b is None:
            return
        if a is None or b is None:
            self.lock(a if b is None else b, reason)
            return
        if a is b:
            return
        if (a < 0).any() or (b < 0).any():
            self.lock(a[b == FIXED], reason)
            self.lock(b[a == FIXED], reason)
            both = (a >= 0) & (b >= 0)
            a, b = a[both], b[both]
        left, right = self.find(a), self.find(b)
        while True:
            differ = left != right
            if not differ.any():
                return
            left, right = left[differ], right[differ]
            less, more = np.minimum(left, right), np.maximum(left, right)
            # several smaller roots may claim the same larger one: the smallest gets it, the others are tied to that in turn
            np.minimum.at(self._parent, more, less)
            lost = self._parent[more] != less
            if not lost.any():
                return
            left, right = self.find(less[lost]), self.find(more[lost])

    def lock(self, ids: Ids, reason: str) -> None:
        """Forbid cutting these ids; the first reason given to a class is the one reported."""
        if ids is not None:
            ids = ids[ids >= 0]
            if len(ids):
                self.locks.append((ids, reason))

    def locked(self, ids: Ids) -> bool:
        """Whether all of these ids are locked by now."""
        return ids is None or bool((self.first_locks()[self.find(ids[ids >= 0])] >= 0).all())

    def reasons(self) -> dict[int, str]:
        """Return root -> reason of every locked class."""
        lock = self.first_locks()
        locked = np.flatnonzero(lock >= 0)
        return {root: self.locks[number][1] for root, number in zip(locked.tolist(), lock[locked].tolist(), strict=True)}

    def first_locks(self) -> NDArray[np.int64]:
        """Number of the first lock of every root, -1 where there is none."""
        lock = np.full(self._size, -1)
        if self.locks:
            # backwards, for of several values the last one stays
            ids = np.concatenate([ids for ids, _ in reversed(self.locks)])
            numbers = np.arange(len(self.locks) - 1, -1, -1)
            lock[self.find(ids)] = np.repeat(numbers, [len(self.locks[number][0]) for number in numbers])
        return lock


def _own_parents(n: int) -> NDArray[np.int64]:
    """Ids that are tied to nothing; ``FREE`` and ``FIXED``, read as indices from the end, are their own parents too."""
    return np.append(np.arange(n, dtype=np.int64), [FREE, FIXED])


@dataclass
class Joined:
    """One concatenation: in a dense block the next one begins with all of it."""

    dim: int
    tensors: Sequence[Tensor]
    """What was joined, as long as nothing writes to any of them."""
    ids: list[Ids]
    extent: int
    """Of the result along ``dim``."""

    def begins(self, dim: int, tensors: Sequence[Tensor]) -> bool:
        """Whether another concatenation begins with all of this one."""
        return self.dim == dim and 0 < len(self.tensors) <= len(tensors) and all(map(is_, self.tensors, tensors))


def first(candidates: Sequence[Ids]) -> Ids:
    """Merge id arrays that describe the same positions: ``FIXED`` wins, for what met it is locked; an id wins over ``FREE``."""
    known = [ids for ids in candidates if ids is not None]
    if len(known) < len(candidates) or not known:
        return None
    merged = known[0]
    for ids in known[1:]:
        if (merged < 0).any() or (ids < 0).any():
            merged = np.where((merged == FIXED) | (ids == FIXED), FIXED, np.where(merged >= 0, merged, ids))
    return merged


def free(n: int) -> NDArray[np.int64]:
    """Return ids for ``n`` broadcast positions."""
    return np.full(n, FREE, dtype=np.int64)
