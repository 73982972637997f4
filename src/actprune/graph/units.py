"""From ids to groups: classes of tied ids become units, alike units become groups, contractions become sites."""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Iterator
from typing import cast

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from actprune.graph.cost import CostModel
from actprune.graph.graph import Consumer, Follower, Graph, Group, Site
from actprune.graph.ids import FREE, Ids
from actprune.graph.state import TraceState

_HOOKABLE = (nn.Linear, nn.modules.conv._ConvNd)


class _Classes:
    """Roots of the ids numbered 0, 1, ...; -1 for what has no class."""

    def __init__(self, state: TraceState) -> None:
        self._space = state.space
        arrays = [ids for dims in state.tensor_ids.values() for ids in dims]
        raw = np.concatenate(arrays) if arrays else np.empty(0, np.int64)
        self.roots = np.unique(self._space.find(raw))

    def of(self, ids: NDArray[np.int64]) -> NDArray[np.int64]:
        """Class index of every id."""
        roots = self._space.find(ids)
        index = np.searchsorted(self.roots, roots)
        index[index == len(self.roots)] = 0
        if not len(self.roots):
            return np.full(len(ids), -1)
        return np.where(self.roots[index] == roots, index, -1)


def build(state: TraceState, model: nn.Module) -> Graph:
    """Turn a trace into a channel graph."""
    _agree(state)
    classes = _Classes(state)
    n = len(classes.roots)
    tensors = {name: [classes.of(ids) for ids in dims] for name, dims in state.tensor_ids.items()}
    reads = [None if c.reads is None else classes.of(c.reads) for c in state.contractions]
    writes = [None if c.writes is None else classes.of(c.writes) for c in state.contractions]

    reasons: list[str | None] = [None] * n
    index_of = {int(root): i for i, root in enumerate(classes.roots)}
    for root, reason in state.space.reasons().items():
        if root in index_of:
            reasons[index_of[root]] = reason
    consumed, produced = np.zeros(n + 1, bool), np.zeros(n + 1, bool)
    for r, w in zip(reads, writes, strict=True):
        if r is not None:
            consumed[r] = True
        if w is not None:
            produced[w] = True
    for i in np.flatnonzero(~consumed[:n]):
        reasons[i] = reasons[i] or "no convolution or matrix product reads it"

    sites = _sites(state, reads)
    groups = _groups(tensors, reasons, consumed[:n] | produced[:n], sites, reads, state)
    cost = _cost(state, model, classes, tensors)
    followers, possible = (
        tuple(Follower(b.module, b.attribute, b.index, classes.of(b.counts)) for b in bindings)
        for bindings in (state.bindings, state.possible + state.asked)
    )
    consumers = tuple(
        Consumer(
            module=c.module,
            weight=c.weight,
            reads_dim=c.weight_reads,
            reads=r,
            writes=w,
            bias=c.bias,
            batch_norm=c.batch_norm if c.readers == 1 else None,
            site=site.name,
            ordinal=site.ordinal,
            operand=c.operand,
            dim=c.dim if site.ordinal is not None else site.dim,
        )
        for c, r, w, site in zip(state.contractions, reads, writes, sites, strict=True)
        if c.weight is not None and r is not None and site is not None
    )
    shapes = {name: tuple(tensor.shape) for name, tensor in state.tensors.items()}
    return Graph(
        groups,
        consumers,
        followers,
        possible,
        _may_tie(state),
        cost,
        n,
        shapes,
        _extents(state, classes),
        _unknown(state, classes, consumed | produced),
    )


def _extents(
    state: TraceState, classes: _Classes
) -> dict[tuple[str, int, int], tuple[str, tuple[tuple[NDArray[np.int64] | None, ...], ...]]]:
    """Classes along every dimension that every operator produced; broadcast dimensions follow others and say nothing."""
    known: dict[int, NDArray[np.int64] | None] = {}

    def of(ids: Ids) -> NDArray[np.int64] | None:
        if ids is None:
            return None
        if id(ids) not in known:
            column = classes.of(ids)
            known[id(ids)] = column if (column >= 0).any() and not (ids == FREE).any() else None
        return known[id(ids)]

    return {
        key: (name, tuple(tuple(of(ids) for ids in dims) for dims in outputs))
        for key, (name, outputs) in state.produced_ids.items()
    }


def _may_tie(state: TraceState) -> frozenset[str]:
    find = state.space.find
    return frozenset(
        path for path, pairs in state.coincidences.items() if any(not np.array_equal(find(a), find(b)) for a, b in pairs)
    )


def _agree(state: TraceState) -> None:
    """An attribute has one value: what it counts in several places leaves together."""
    first: dict[tuple[str, str, int | None], NDArray[np.int64]] = {}
    for binding in state.bindings:
        known = first.setdefault((binding.module, binding.attribute, binding.index), binding.counts)
        why = f"counted by {binding.attribute} of {binding.module or 'the model'}"
        if len(known) == len(binding.counts):
            state.space.tie(known, binding.counts, why)
        else:
            state.space.lock(known, why)
            state.space.lock(binding.counts, why)


def _unknown(state: TraceState, classes: _Classes, matters: NDArray[np.bool_]) -> dict[str, int]:
    """How often an operator without a rule locked something that a contraction reads or produces."""
    counts: dict[str, int] = defaultdict(int)
    for name, ids in state.refused:
        found = classes.of(ids)
        counts[name] += bool(matters[found[found >= 0]].any())
    return {name: count for name, count in counts.items() if count}


def _sites(state: TraceState, reads: list[NDArray[np.int64] | None]) -> list[Site | None]:
    """The site of every contraction, positions still one row per read position."""
    sites: list[Site | None] = []
    seen: dict[str, int] = defaultdict(int)
    for contraction, ids in zip(state.contractions, reads, strict=True):
        if ids is None or contraction.training:
            sites.append(None)
            continue
        path = contraction.module
        name = path if not seen[path] else f"{path}#{seen[path]}"
        seen[path] += 1
        module = state.modules[path]
        own = isinstance(module, _HOOKABLE) and contraction.ordinal == 0
        dim = (-1 if isinstance(module, nn.Linear) else 1 - cast(Tensor, module.weight).dim()) if own else contraction.dim
        positions = np.arange(len(ids))
        sites.append(Site(name, path, None if own else contraction.ordinal, contraction.operand, dim, positions))
    return sites


def _groups(
    tensors: dict[str, list[NDArray[np.int64]]],
    reasons: list[str | None],
    matters: NDArray[np.bool_],
    sites: list[Site | None],
    reads: list[NDArray[np.int64] | None],
    state: TraceState,
) -> tuple[Group, ...]:
    columns = {(name, dim): column for name, dims in tensors.items() for dim, column in enumerate(dims)}
    order = np.full(len(reasons), np.iinfo(np.int64).max)
    for (name, dim), column in columns.items():
        raw = state.tensor_ids[name][dim]
        known = column >= 0
        np.minimum.at(order, column[known], raw[known])
    grouping = _Grouping(_signatures(columns, reasons), order, matters)
    members: list[dict[tuple[str, int], NDArray[np.int64]]] = [{} for _ in grouping.classes]
    for key, column in columns.items():
        for group, positions in grouping.positions(column):
            members[group][key] = positions
    read_at: list[list[Site]] = [[] for _ in grouping.classes]
    for site, read in zip(sites, reads, strict=True):
        if site is not None and read is not None:
            for group, positions in grouping.positions(read):
                read_at[group].append(dataclasses.replace(site, positions=positions))
    producing = {c.weight: 1 - c.weight_reads for c in state.contractions if c.weight is not None}
    first_use = {name: i for i, name in enumerate(state.tensor_ids)}
    used: dict[str, int] = defaultdict(int)
    groups = []
    for classes, keys, group_sites in zip(grouping.classes, members, read_at, strict=True):
        name = _name(keys, first_use, producing)
        used[name] += 1
        groups.append(
            Group(
                name=name if used[name] == 1 else f"{name}#{used[name]}",
                size=len(classes),
                locked=reasons[classes[0]],
                members=keys,
                classes=classes,
                sites=tuple(group_sites),
            )
        )
    return tuple(groups)


def _signatures(columns: dict[tuple[str, int], NDArray[np.int64]], reasons: list[str | None]) -> NDArray[np.uint64]:
    """One number per class, equal for classes that cut the same dimensions by the same amounts and share a lock reason."""
    generator = np.random.default_rng(0)
    n = len(reasons)
    signature = np.zeros(n, dtype=np.uint64)
    for column in columns.values():
        counts = np.bincount(column[column >= 0], minlength=n).astype(np.uint64)
        # a random odd factor per dimension: sums of different multisets collide with probability 2^-64
        signature += counts * (generator.integers(1 << 63, dtype=np.uint64) * np.uint64(2) + np.uint64(1))
    known = {reason: number for number, reason in enumerate(dict.fromkeys(reasons))}
    factors = generator.integers(1 << 63, size=len(known), dtype=np.uint64)
    return signature + factors[[known[reason] for reason in reasons]] if n else signature


class _Grouping:
    """Classes of equal signature, in order of first use; finds every group's positions in a column at once."""

    def __init__(self, signatures: NDArray[np.uint64], order: NDArray[np.int64], matters: NDArray[np.bool_]) -> None:
        chosen = np.flatnonzero(matters)
        chosen = chosen[np.argsort(order[chosen], kind="stable")]
        _, first, inverse = np.unique(signatures[chosen], return_index=True, return_inverse=True)
        # number groups by their first class
        rank = np.empty(len(first), dtype=np.int64)
        rank[np.argsort(first, kind="stable")] = np.arange(len(first))
        group = rank[inverse]
        by_group = np.argsort(group, kind="stable")
        bounds = np.searchsorted(group[by_group], np.arange(len(first) + 1))
        self.classes = [chosen[by_group[a:b]] for a, b in zip(bounds[:-1], bounds[1:], strict=True)]
        self._bounds = bounds
        # place of every class in the list of all groups, -1 where it is in none; index -1 stands for "no class"
        self._place = np.full(len(signatures) + 1, -1)
        self._place[chosen[by_group]] = np.arange(len(chosen))

    def positions(self, column: NDArray[np.int64]) -> Iterator[tuple[int, NDArray[np.int64]]]:
        """Yield (group, (n_units, k) positions) for every group of which each unit has k positions in the column."""
        place = self._place[column]
        by_place = np.argsort(place, kind="stable")
        by_place = by_place[np.searchsorted(place[by_place], 0) :]
        starts = np.searchsorted(place[by_place], self._bounds)
        for group in np.flatnonzero(np.diff(starts)).tolist():
            found = by_place[starts[group] : starts[group + 1]]
            size = len(self.classes[group])
            width = len(found) // size
            # alike by construction in parameters; what a site reads need not be
            if width * size == len(found) and np.array_equal(
                place[found], np.repeat(np.arange(self._bounds[group], self._bounds[group + 1]), width)
            ):
                yield group, found.reshape(size, width)


def _name(keys: dict[tuple[str, int], NDArray[np.int64]], first_use: dict[str, int], producing: dict[str, int]) -> str:
    """Path of the first module whose weight produces the units, else of the first tensor they cut."""
    first = min(keys, key=lambda key: (producing.get(key[0]) != key[1], first_use[key[0]]))
    return first[0].rpartition(".")[0] or first[0]


def _cost(state: TraceState, model: nn.Module, classes: _Classes, tensors: dict[str, list[NDArray[np.int64]]]) -> CostModel:
    cost = CostModel(len(classes.roots))
    for name, parameter in model.named_parameters():
        if name in tensors:
            cost.add("params", 1, tensors[name])
        else:
            cost.add("params", parameter.numel(), [])
    for contraction in (c for c in state.contractions if not c.training):
        cost.add("macs", contraction.macs, [classes.of(ids) for ids in contraction.widths])
    return cost
