"""Alike classes become groups; what each group cuts and where it is read is found at once for all, in arrays.

In a dense chain the n-th tensor holds a piece of every group before it, so that groups and tensors meet n^2 / 2 times. Finding
those meetings is a sort of all positions; a Python object is made for one only when somebody asks its group.
"""

from __future__ import annotations

import dataclasses
import functools
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from actprune.graph.graph import Group, Site
from actprune.graph.state import TraceState

Column = NDArray[np.int64]
"""Class of every position of a dimension, -1 where it has none."""
Key = tuple[str, int]
"""(parameter or buffer, dimension)."""


class Members(Mapping[Key, NDArray[np.int64]]):
    """(parameter or buffer, dimension) -> (n_units, k) positions that leave with each unit of a group."""

    def __init__(self, met: _Met, group: int, keys: Sequence[Key]) -> None:
        self._met, self._group, self._keys = met, group, keys

    @functools.cached_property
    def _found(self) -> dict[Key, NDArray[np.int64]]:
        return {self._keys[column]: positions for column, positions in self._met.meetings.of(self._group)}

    def __getitem__(self, key: Key) -> NDArray[np.int64]:
        """Positions along one dimension."""
        return self._found[key]

    def __iter__(self) -> Iterator[Key]:
        """Dimensions in order of first use."""
        return iter(self._found)

    def __len__(self) -> int:
        """Number of dimensions."""
        return len(self._found)


class Sites(Sequence[Site]):
    """The sites of a group, in order of execution."""

    def __init__(self, met: _Met, group: int, sites: Sequence[Site]) -> None:
        self._met, self._group, self._sites = met, group, sites

    @functools.cached_property
    def _found(self) -> list[Site]:
        found = self._met.meetings.of(self._group)
        return [dataclasses.replace(self._sites[number], positions=positions) for number, positions in found]

    def __getitem__(self, index: Any) -> Any:
        """One site, or a list of them."""
        return self._found[index]

    def __len__(self) -> int:
        """Number of sites."""
        return len(self._found)


class _Met:
    """Columns that groups meet; where, is found once somebody asks."""

    def __init__(self, grouping: _Grouping, columns: Sequence[Column]) -> None:
        self._grouping, self._columns = grouping, columns

    @functools.cached_property
    def meetings(self) -> _Meetings:
        """Where groups and columns meet."""
        return _Meetings(self._grouping, _Joined(self._columns))


def group(
    columns: Mapping[Key, Column],
    reasons: list[str | None],
    matters: NDArray[np.bool_],
    sites: Sequence[Site | None],
    reads: Sequence[Column | None],
    state: TraceState,
) -> tuple[Group, ...]:
    """Make groups of alike classes.

    Args:
        columns: classes along every dimension of every parameter and buffer.
        reasons: why each class is locked.
        matters: which classes any contraction reads or produces; the others are in no group.
        sites: of every contraction, with one position per read position.
        reads: classes that each contraction reads.
        state: the trace.
    """
    keys = list(columns)
    joined = _Joined(list(columns.values()))
    order = np.full(len(reasons), np.iinfo(np.int64).max)
    raw = [state.tensor_ids[name][dim] for name, dim in keys]
    np.minimum.at(order, joined.classes, np.concatenate([*raw, joined.empty])[joined.known])
    grouping = _Grouping(_signatures(joined, reasons), order, matters)
    members = _Met(grouping, list(columns.values()))
    read = [(site, column) for site, column in zip(sites, reads, strict=True) if site is not None and column is not None]
    read_at = _Met(grouping, [column for _, column in read])
    own_sites = [site for site, _ in read]
    producing = {c.weight: 1 - c.weight_reads for c in state.contractions if c.weight is not None}
    named_by = joined.first(np.array([producing.get(name) == dim for name, dim in keys], bool), len(reasons))
    used: dict[str, int] = defaultdict(int)
    groups = []
    for number, classes in enumerate(grouping.classes):
        name = _named(keys[named_by[classes[0]]])
        used[name] += 1
        groups.append(
            Group(
                name=name if used[name] == 1 else f"{name}#{used[name]}",
                size=len(classes),
                locked=reasons[classes[0]],
                members=Members(members, number, keys),
                classes=classes,
                sites=Sites(read_at, number, own_sites),
            )
        )
    return tuple(groups)


def _named(key: Key) -> str:
    """Path of the module that holds a tensor, else the tensor's own name."""
    return key[0].rpartition(".")[0] or key[0]


class _Joined:
    """Columns one after another, without the positions that have no class."""

    empty = np.empty(0, np.int64)

    def __init__(self, columns: Sequence[Column]) -> None:
        sizes = np.array([len(column) for column in columns], np.int64)
        every = np.concatenate([*columns, self.empty])
        self.n = len(columns)
        self.known = np.flatnonzero(every >= 0)
        """Where the known positions stand among all."""
        self.classes = every[self.known]
        self.column = np.repeat(np.arange(self.n), sizes)[self.known]
        self._before = np.append(0, np.cumsum(sizes))

    def positions(self) -> NDArray[np.int64]:
        """Where every known position stands in its column."""
        return self.known - self._before[self.column]

    def first(self, preferred: NDArray[np.bool_], n: int) -> NDArray[np.int64]:
        """The first column that holds each of ``n`` classes; the first preferred one, if there is one."""
        found = np.zeros(n, np.int64)
        for chosen in (slice(None), np.flatnonzero(preferred[self.column])):
            # backwards, for of several values the last one stays
            found[self.classes[chosen][::-1]] = self.column[chosen][::-1]
        return found


def _signatures(joined: _Joined, reasons: list[str | None]) -> NDArray[np.uint64]:
    """One number per class, equal for classes that cut the same dimensions by the same amounts and share a lock reason."""
    generator = np.random.default_rng(0)
    n = len(reasons)
    signature = np.zeros(n, dtype=np.uint64)
    # a random odd factor per dimension: sums of different multisets collide with probability 2^-64
    odd = generator.integers(1 << 63, size=joined.n, dtype=np.uint64) * np.uint64(2) + np.uint64(1)
    np.add.at(signature, joined.classes, odd[joined.column])
    known = {reason: number for number, reason in enumerate(dict.fromkeys(reasons))}
    factors = generator.integers(1 << 63, size=len(known), dtype=np.uint64)
    return signature + factors[[known[reason] for reason in reasons]] if n else signature


class _Grouping:
    """Classes of equal signature, in order of first use."""

    def __init__(self, signatures: NDArray[np.uint64], order: NDArray[np.int64], matters: NDArray[np.bool_]) -> None:
        chosen = np.flatnonzero(matters)
        chosen = chosen[np.argsort(order[chosen], kind="stable")]
        _, first, inverse = np.unique(signatures[chosen], return_index=True, return_inverse=True)
        # number groups by their first class
        rank = np.empty(len(first), dtype=np.int64)
        rank[np.argsort(first, kind="stable")] = np.arange(len(first))
        group = rank[inverse]
        by_group = np.argsort(group, kind="stable")
        self.group = group[by_group]
        """Group of every place."""
        self.bounds = np.searchsorted(self.group, np.arange(len(first) + 1))
        """Group ``g`` has places ``bounds[g]`` to ``bounds[g + 1]`` in the list of all classes that are in groups."""
        self.classes = [chosen[by_group[a:b]] for a, b in zip(self.bounds[:-1], self.bounds[1:], strict=True)]
        # place of every class in that list, -1 where it is in none
        self.place = np.full(len(signatures), -1)
        self.place[chosen[by_group]] = np.arange(len(chosen))


def _runs(values: NDArray[np.int64]) -> NDArray[np.int64]:
    """Where runs of equal values begin."""
    new = np.ones(len(values), bool)
    np.not_equal(values[1:], values[:-1], out=new[1:])
    return np.flatnonzero(new)


class _Meetings:
    """Where groups and columns meet: the positions of every unit, for units that have equally many."""

    def __init__(self, grouping: _Grouping, joined: _Joined) -> None:
        place = grouping.place[joined.classes]
        inside = np.flatnonzero(place >= 0)
        place = place[inside]
        key = grouping.group[place]
        key *= joined.n
        key += joined.column[inside]
        key *= len(grouping.place)
        key += place
        # positions stay in order, for the sort is stable
        order = np.argsort(key, kind="stable")
        self._positions = joined.positions()[inside[order]]
        key = key[order]
        units = _runs(key)
        pairs = key[units] // max(len(grouping.place), 1)
        first = _runs(pairs)
        of_group, self._column = np.divmod(pairs[first], max(joined.n, 1))
        self._start = np.append(units[first], len(key))
        self._size = np.diff(grouping.bounds)[of_group]
        # alike by construction in parameters; what a site reads need not be: every unit is met, equally often
        met = np.diff(first, append=len(units))
        most = np.maximum.reduceat(np.diff(units, append=len(key)), first)
        self._even = (met == self._size) & (most * self._size == np.diff(self._start))
        self._bounds = np.searchsorted(of_group, np.arange(len(grouping.classes) + 1))

    def of(self, group: int) -> Iterator[tuple[int, NDArray[np.int64]]]:
        """Yield (column, (n_units, k) positions) for every column that a group meets."""
        start, stop = self._bounds[group], self._bounds[group + 1]
        for number in start + np.flatnonzero(self._even[start:stop]):
            found = self._positions[self._start[number] : self._start[number + 1]]
            yield int(self._column[number]), found.reshape(self._size[number], -1)
