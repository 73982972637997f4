"""What a rehearsal takes of every group, so that widths which have to stay equal do not stay so by chance."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import chain, pairwise
from random import Random
from zlib import crc32

import numpy as np
from numpy.typing import NDArray

from actprune.graph import Graph, Group

_SEEDS = 32

# Uneven shares, and two of them. Then half of the groups alone: two heads and two heads always lose one each.
_FIXED: tuple[Callable[[int, int], Sequence[int]], ...] = (
    lambda i, n: range(1, n, 2 + i % 3),
    lambda i, n: range(max(1, n * (1 + i % 5) // 7)),
    lambda i, n: range(n // 2 if i.bit_count() % 2 else 0),
)


class Shares:
    """Several cuts of any groups of a model, one of them such that widths which may be one become different.

    Where parts follow integers that may equal them by chance, another one leaves one unit of every part: a third, rounded,
    stays right as long as one unit leaves. Where an integer may follow one of several groups of two units, every other of
    them is cut alone, then the rest: what runs with one head may run anything, so what has both must run with it.
    What a group loses depends on its name alone: a repair that ties groups somewhere changes no cut elsewhere.
    """

    def __init__(self, graph: Graph) -> None:
        pairs = list(_pairs(graph).values())
        self._of_parts = _of_parts(graph)
        self._pairs_of_units = _pairs_of_units(graph)
        self._seed = min(range(_SEEDS), key=lambda seed: self._equal(graph, pairs, seed)) if pairs else 0
        self._told_apart = _told_apart(graph, pairs, self._seed)

    def __len__(self) -> int:
        """Number of cuts."""
        return len(_FIXED) + 1 + bool(self._of_parts) + 2 * bool(self._pairs_of_units)

    def of(self, number: int, group: Group) -> Sequence[int]:
        """Units that leave a group in one of the cuts."""
        if number < len(_FIXED):
            return _FIXED[number](crc32(group.name.encode()), group.size)
        if number == len(_FIXED):
            n = self._told_apart.get(group.name, group.size)
            return range(n) if n < group.size else _drawn(self._seed, group)
        if number == len(_FIXED) + 1 and self._of_parts:
            return range(0 if self._of_parts.isdisjoint(group.members) else group.size - 1)
        return range(self._pairs_of_units.get(group.name) == len(self) - number)

    @staticmethod
    def _equal(graph: Graph, pairs: Sequence[tuple[NDArray[np.int64], NDArray[np.int64]]], seed: int) -> int:
        """How many pairs of widths remain equal."""
        gone = graph.removed({group.name: _drawn(seed, group) for group in graph.unlocked})
        stays = np.append(~gone, True)
        return sum(int(stays[a].sum()) == int(stays[b].sum()) for a, b in pairs)


def _drawn(seed: int, group: Group) -> Sequence[int]:
    return range(Random(f"{seed} {group.name}").randrange(group.size))


def _told_apart(graph: Graph, pairs: Sequence[tuple[NDArray[np.int64], NDArray[np.int64]]], seed: int) -> dict[str, int]:
    """Group -> how many units leave instead, where a drawn cut leaves equal what need not be: hundreds of pairs of four heads.

    One group after the other takes the number with which the fewest of its pairs are equal.
    """
    groups = {group.name: group for group in graph.unlocked}
    leave = {name: len(_drawn(seed, group)) for name, group in groups.items()}
    owner = {cls: name for name, group in groups.items() for cls in group.classes.tolist()}
    of_group: dict[str, list[int]] = {}
    for number, pair in enumerate(pairs):
        for name in {owner[cls] for column in pair for cls in np.unique(column).tolist() if cls in owner}:
            of_group.setdefault(name, []).append(number)
    stays = np.append(~graph.removed({name: range(n) for name, n in leave.items()}), True)
    settled: dict[str, int] = {}

    def equal(numbers: Sequence[int]) -> int:
        return sum(int(stays[pairs[i][0]].sum()) == int(stays[pairs[i][1]].sum()) for i in numbers)

    for name in sorted(of_group, key=lambda name: len(of_group[name])):
        if not equal(of_group[name]):
            continue
        group, found = groups[name], {}
        for n in dict.fromkeys([leave[name], *np.linspace(0, group.size - 1, min(group.size, _SEEDS)).astype(int).tolist()]):
            stays[group.classes] = np.arange(group.size) >= n
            found[n] = equal(of_group[name])
        settled[name] = min(found, key=lambda n: found[n])
        stays[group.classes] = np.arange(group.size) >= settled[name]
    return settled


def _of_parts(graph: Graph) -> frozenset[tuple[str, int]]:
    """Dimensions with units that assumed followers count."""
    counted = np.zeros(graph.n_classes + 1, bool)
    for follower in graph.followers:
        if follower.assumed:
            counted[follower.counts] = True
    counted[-1] = False  # positions without a class
    return frozenset(key for group in graph.unlocked if counted[group.classes].any() for key in group.members)


def _pairs_of_units(graph: Graph) -> dict[str, int]:
    """Groups of two units that one integer may follow beside others -> 1 or 2, by turns."""
    rivals = _of_one_integer(graph, [group for group in graph.unlocked if group.size == 2])
    names = dict.fromkeys(name for _, found in rivals if len(found) > 1 for name in found)
    return {name: 1 + number % 2 for number, name in enumerate(names)}


def _pairs(graph: Graph) -> dict[tuple[bytes, bytes], tuple[NDArray[np.int64], NDArray[np.int64]]]:
    """Widths that a module, or one integer in several calls, may take for one, each pair once, where either can change."""
    cuttable = np.append(np.zeros(graph.n_classes, bool), False)
    for group in graph.unlocked:
        cuttable[group.classes] = True
    several = {path for path, call, _ in graph.extents if call}  # calls of a layer that two blocks share, say
    shared = chain.from_iterable(
        pairwise(found.values()) for path, found in _of_one_integer(graph, graph.unlocked) if path in several
    )
    pairs = chain(shared, *graph.may_tie.values())
    return {(a.tobytes(), b.tobytes()): (a, b) for a, b in pairs if cuttable[a].any() or cuttable[b].any()}


def _of_one_integer(graph: Graph, groups: Sequence[Group]) -> Iterator[tuple[str, Mapping[str, NDArray[np.int64]]]]:
    """Of every integer its module's path, and the groups among these that it may follow -> the width it would count."""
    owner = {cls: group.name for group in groups for cls in group.classes.tolist()}
    followed: dict[tuple[str, str, int | None], dict[str, NDArray[np.int64]]] = {}
    for one in (one for one in graph.possible if not one.alone):
        names = {owner.get(cls, "") for cls in one.counts.tolist()}
        if len(names) == 1 and "" not in names:
            followed.setdefault((one.module, one.attribute, one.index), {}).setdefault(names.pop(), one.counts)
    return ((module, found) for (module, _, _), found in followed.items())
