"""From ids to groups: classes of tied ids become units, alike units become groups, contractions become sites."""

from __future__ import annotations

from collections import defaultdict
from typing import cast

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn
from torchmetrics import Metric

from actprune.core.layers import runs_torch_forward
from actprune.core.operands import InCall, Ordinal
from actprune.graph.cost import CostModel
from actprune.graph.extents import Extents
from actprune.graph.graph import Apart, Consumer, Follower, Graph, Site
from actprune.graph.grouping import group
from actprune.graph.rules.recurrent import is_recurrent
from actprune.graph.state import Column, TraceState

_HOOKABLE = (nn.Linear, nn.modules.conv._ConvNd)


class _Classes:
    """Roots of the ids numbered 0, 1, ...; -1 for what has no class."""

    def __init__(self, state: TraceState) -> None:
        roots = state.space.find(np.arange(len(state.space)))
        used = np.zeros(len(roots), bool)
        held = [ids for dims in state.tensor_ids.values() for ids in dims]
        used[roots[np.concatenate([*held, roots[:0]])]] = True
        self.roots = np.flatnonzero(used)
        number = np.full(len(roots), -1)
        number[self.roots] = np.arange(len(self.roots))
        self._index = np.concatenate([number[roots], [-1, -1]])  # ids that are fixed or free are negative

    def of(self, ids: NDArray[np.int64]) -> NDArray[np.int64]:
        """Class index of every id."""
        return self._index[ids]


def build(state: TraceState, model: nn.Module) -> Graph:
    """Turn a trace into a channel graph; networks inside metrics measure the model: they are neither cut nor counted."""
    metrics = tuple(f"{path}." for path, module in model.named_modules() if path and isinstance(module, Metric))
    for metric in metrics:
        for ids in (ids for name, dims in state.tensor_ids.items() if name.startswith(metric) for ids in dims):
            state.space.lock(ids, f"belongs to the metric {metric[:-1]}")
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
    columns = {(name, dim): column for name, dims in tensors.items() for dim, column in enumerate(dims)}
    groups = group(columns, reasons, consumed[:n] | produced[:n], _once(sites), reads, state)
    cost = _cost(state, model, classes, tensors, reads, metrics)
    followers, possible = (
        tuple(Follower(b.module, b.attribute, b.index, classes.of(b.counts), b.assumed, b.alone) for b in bindings)
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
        columns,
        consumers,
        followers,
        possible,
        _may_tie(state, classes),
        cost,
        n,
        shapes,
        Extents(state.produced_ids, state.numbers, state.lengths, state.skipped, state.means, state.reads.told, classes.of),
        _unknown(state, classes, consumed | produced),
        _apart(state, classes),
        state.copies,
    )


def _may_tie(state: TraceState, classes: _Classes) -> dict[str, list[tuple[NDArray[np.int64], NDArray[np.int64]]]]:
    found = {}
    for path, pairs in state.coincidences.items():
        of_path = [(classes.of(a), classes.of(b)) for a, b in pairs]
        if differ := [(a, b) for a, b in of_path if not np.array_equal(a, b)]:
            found[path] = differ
    return found


def _apart(state: TraceState, classes: _Classes) -> tuple[Apart, ...]:
    """What the code found different, each pair once, where either can change."""

    def width(column: Column | int) -> NDArray[np.int64] | int:
        """Classes of every position; a number where none can leave, -1 for a parameter that nothing reads."""
        if isinstance(column, tuple):
            name, dim = column
            column = state.tensor_ids[name][dim] if name in state.tensor_ids else -1
        if isinstance(column, int):
            return column
        of_positions = classes.of(column)
        return of_positions if (of_positions >= 0).any() else len(of_positions)

    found: dict[tuple[str, bytes, bytes | int], Apart] = {}
    for module, *pair in state.unequal:
        one, other = map(width, pair)
        if isinstance(one, int):
            one, other = other, one
        if not isinstance(one, int):
            key = module, one.tobytes(), other if isinstance(other, int) else other.tobytes()
            found.setdefault(key, Apart(module, one, other))
    return tuple(found.values())


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
    """The site of every contraction, positions still one row per read position.

    Both directions of a recurrent layer that is followed as a whole share one.
    """
    sites: list[Site | None] = []
    ordinals = _ordinals(state)
    latest: dict[str, Site] = {}
    seen: dict[str, int] = defaultdict(int)
    for contraction, ids, ordinal in zip(state.contractions, reads, ordinals, strict=True):
        if ids is None or contraction.training or not contraction.observed:
            sites.append(None)
            continue
        path = contraction.module
        module = state.modules[path]
        whole = is_recurrent(module)
        if whole and contraction.ordinal:
            sites.append(latest[path])
            continue
        name = path if not seen[path] else f"{path}#{seen[path]}"
        seen[path] += 1
        own = whole or (isinstance(module, _HOOKABLE) and contraction.ordinal == 0 and runs_torch_forward(module))
        last = whole or isinstance(module, nn.Linear)
        dim = (-1 if last else 1 - cast(Tensor, module.weight).dim()) if own else contraction.dim
        positions = np.arange(len(ids))
        _, extents = state.flattened.get(id(contraction.reads), (None, ()))
        latest[path] = Site(name, path, None if own else ordinal, contraction.operand, dim, positions, extents)
        sites.append(latest[path])
    return sites


def _ordinals(state: TraceState) -> list[Ordinal]:
    """Which contraction of its module each is, and of which call where these run different ones."""
    calls: dict[str, dict[int, list[tuple[object, ...]]]] = defaultdict(lambda: defaultdict(list))
    for c in state.contractions:
        if not c.training:
            # what one weight reads in several calls is tied; parts of weights, and what is no weight, may be given anything
            read = None if c.weight is not None or c.reads is None else c.reads.tobytes()
            calls[c.module][c.call].append((c.operand, c.dim, c.weight, read))
    n_calls = {path: max(state.calls[path], *(call + 1 for call in of_path)) for path, of_path in calls.items()}
    differ = {path for path, n in n_calls.items() if len({tuple(calls[path][call]) for call in range(n)}) > 1}
    return [InCall(c.ordinal, c.call, n_calls[c.module]) if c.module in differ else c.ordinal for c in state.contractions]


def _once(sites: list[Site | None]) -> list[Site | None]:
    """The same, with None for what was there before."""
    first: dict[int, int] = {}
    for place, site in enumerate(sites):
        first.setdefault(id(site), place)
    return [site if first[id(site)] == place else None for place, site in enumerate(sites)]


def _cost(
    state: TraceState,
    model: nn.Module,
    classes: _Classes,
    tensors: dict[str, list[NDArray[np.int64]]],
    reads: list[NDArray[np.int64] | None],
    metrics: tuple[str, ...],
) -> CostModel:
    cost = CostModel(len(classes.roots))
    known = {id(c.reads): read for c, read in zip(state.contractions, reads, strict=True) if read is not None}
    # a copy's parameters have the names of its original's, which are counted once
    for name, parameter in {state.names.get(id(p), name): p for name, p in model.named_parameters()}.items():
        if name.startswith(metrics):
            continue
        if name in tensors:
            cost.add("params", 1, tensors[name])
        else:
            cost.add("params", parameter.numel(), [])
    for contraction in (c for c in state.contractions if not c.training and not f"{c.module}.".startswith(metrics)):
        widths = [known[id(ids)] if id(ids) in known else classes.of(ids) for ids in contraction.widths]
        cost.add("macs", contraction.macs, widths)
    return cost
