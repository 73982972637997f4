"""From ids to groups: classes of tied ids become units, alike units become groups, contractions become sites."""

from __future__ import annotations

from collections import defaultdict

import numpy as np
from numpy.typing import NDArray
from torch import nn

from actprune.graph.cost import CostModel
from actprune.graph.graph import Consumer, Follower, Graph, Group, Site
from actprune.graph.ids import Ids
from actprune.graph.state import Contraction, TraceState

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
    groups = _groups(tensors, reasons, consumed[:n] | produced[:n], sites, writes, state)
    cost = _cost(state, model, classes, tensors)
    followers, possible = (
        tuple(Follower(b.module, b.attribute, b.index, classes.of(b.counts)) for b in bindings)
        for bindings in (state.bindings, state.possible)
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
    return Graph(groups, consumers, followers, possible, cost, n, shapes, _unknown(state, classes, consumed))


def _unknown(state: TraceState, classes: _Classes, consumed: NDArray[np.bool_]) -> dict[str, int]:
    """How often an operator without a rule locked something that a contraction reads."""
    counts: dict[str, int] = defaultdict(int)
    for name, ids in state.refused:
        found = classes.of(ids)
        counts[name] += bool(consumed[found[found >= 0]].any())
    return {name: count for name, count in counts.items() if count}


def _sites(state: TraceState, reads: list[NDArray[np.int64] | None]) -> list[Site | None]:
    """The site of every contraction, positions still one row per read position."""
    sites: list[Site | None] = []
    seen: dict[str, int] = defaultdict(int)
    for contraction, ids in zip(state.contractions, reads, strict=True):
        if ids is None:
            sites.append(None)
            continue
        path = contraction.module
        name = path if not seen[path] else f"{path}#{seen[path]}"
        seen[path] += 1
        module = state.modules[path]
        own = isinstance(module, _HOOKABLE) and contraction.ordinal == 0
        dim = (-1 if isinstance(module, nn.Linear) else 1) if own else contraction.dim
        positions = np.arange(len(ids))
        sites.append(Site(name, path, None if own else contraction.ordinal, contraction.operand, dim, positions))
    return sites


def _groups(
    tensors: dict[str, list[NDArray[np.int64]]],
    reasons: list[str | None],
    matters: NDArray[np.bool_],
    sites: list[Site | None],
    writes: list[NDArray[np.int64] | None],
    state: TraceState,
) -> tuple[Group, ...]:
    members: list[dict[tuple[str, int], NDArray[np.int64]]] = [{} for _ in reasons]
    order = np.full(len(reasons), np.iinfo(np.int64).max)
    for name, dims in tensors.items():
        for dim, column in enumerate(dims):
            by_class = np.argsort(column, kind="stable")
            found, starts = np.unique(column[by_class], return_index=True)
            for cls, positions in zip(found.tolist(), np.split(by_class, starts[1:]), strict=True):
                members[cls][(name, dim)] = positions
                order[cls] = min(order[cls], int(state.tensor_ids[name][dim][positions[0]]))
    alike: dict[tuple[object, ...], list[int]] = defaultdict(list)
    for cls in np.argsort(order, kind="stable").tolist():
        if matters[cls]:
            signature = tuple((key, len(positions)) for key, positions in members[cls].items())
            alike[(signature, reasons[cls])].append(cls)
    read_at = _read_at(state, sites, len(reasons))
    producers = {id(w): c.weight for c, w in zip(state.contractions, writes, strict=True) if w is not None and c.weight}
    named: dict[str, int] = defaultdict(int)
    groups = []
    for chosen in alike.values():
        keys = members[chosen[0]]
        stacked = {key: np.stack([members[cls][key] for cls in chosen]) for key in keys}
        name = _name(keys, state, set(producers.values()))
        named[name] += 1
        groups.append(
            Group(
                name=name if named[name] == 1 else f"{name}#{named[name]}",
                size=len(chosen),
                locked=reasons[chosen[0]],
                members=stacked,
                classes=np.array(chosen),
                sites=_group_sites(chosen, read_at, sites),
            )
        )
    return tuple(groups)


def _name(keys: dict[tuple[str, int], NDArray[np.int64]], state: TraceState, weights: set[str | None]) -> str:
    """Path of the first module whose weight produces the units, else of the first tensor they cut."""
    order = {name: i for i, name in enumerate(state.tensor_ids)}
    producing = {c.weight: 1 - c.weight_reads for c in state.contractions if c.weight is not None}
    first = min(keys, key=lambda key: (producing.get(key[0]) != key[1], order[key[0]]))
    return first[0].rpartition(".")[0] or first[0]


def _read_at(state: TraceState, sites: list[Site | None], n: int) -> list[dict[int, NDArray[np.int64]]]:
    """For every class: contraction index -> positions it reads of that class."""
    classes = _Classes(state)
    found: list[dict[int, NDArray[np.int64]]] = [{} for _ in range(n)]
    for index, (contraction, site) in enumerate(zip(state.contractions, sites, strict=True)):
        if site is None:
            continue
        column = classes.of(contraction.reads)  # type: ignore[arg-type]
        by_class = np.argsort(column, kind="stable")
        present, starts = np.unique(column[by_class], return_index=True)
        for cls, positions in zip(present.tolist(), np.split(by_class, starts[1:]), strict=True):
            if cls >= 0:
                found[cls][index] = positions
    return found


def _group_sites(
    chosen: list[int], read_at: list[dict[int, NDArray[np.int64]]], sites: list[Site | None]
) -> tuple[Site, ...]:
    result = []
    for index in sorted(read_at[chosen[0]]):
        site = sites[index]
        rows = [read_at[cls].get(index) for cls in chosen]
        if site is None or any(row is None or len(row) != len(rows[0]) for row in rows):  # type: ignore[arg-type]
            continue
        result.append(Site(site.name, site.module, site.ordinal, site.operand, site.dim, np.stack(rows)))  # type: ignore[arg-type]
    return tuple(result)


def _cost(
    state: TraceState, model: nn.Module, classes: _Classes, tensors: dict[str, list[NDArray[np.int64]]]
) -> CostModel:
    cost = CostModel(len(classes.roots))
    for name, parameter in model.named_parameters():
        if name in tensors:
            cost.add("params", 1, tensors[name])
        else:
            cost.add("params", parameter.numel(), [])
    for contraction in state.contractions:
        cost.add("macs", contraction.macs, [_width(classes, ids) for ids in contraction.widths])
    return cost


def _width(classes: _Classes, ids: Ids) -> NDArray[np.int64]:
    assert ids is not None
    return classes.of(ids)


__all__ = ["Contraction", "build"]
