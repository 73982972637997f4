"""Reading and writing by index: indexed dimensions are fixed, the others pass and are tied where values are written."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from actprune.graph.ids import FREE, Ids
from actprune.graph.rules.registry import rule
from actprune.graph.state import TraceState

_READ, _WRITTEN = "indexed by position", "written by position"


@rule("embedding")
def embedding(t: TraceState, a: SimpleNamespace, out: Tensor) -> None:
    """Rows are picked by index, columns are the channels."""
    rows, columns = t.ids(a.weight)
    t.lock(rows, "rows of an embedding")
    t.set(out, [*[None] * a.indices.dim(), columns])


@rule("_embedding_bag", "_embedding_bag_forward_only")
def embedding_bag(t: TraceState, a: SimpleNamespace, out: Sequence[Tensor]) -> None:
    """Rows are picked by index and summed, averaged or compared column by column; weights are per row."""
    rows, columns = t.ids(a.weight)
    t.lock(rows, "rows of an embedding")
    if a.per_sample_weights is not None:
        t.lock(t.ids(a.per_sample_weights)[0], "weights of an embedding's rows")
    t.set(out[0], [None, columns])


@rule("index", "_unsafe_index")
def index(t: TraceState, a: SimpleNamespace, out: Tensor) -> None:
    """Indexed dimensions cannot be cut, unless nobody looks at the values; the others pass."""
    x = t.ids(a.input)
    t.set(out, [None if d is None else x[d] for d in _origins(a, out.dim())])
    picked = [ids for d in _indexed(a) if (ids := x[d]) is not None]
    if picked:
        t.lock_once_read(out, np.concatenate(picked), _READ)


def _indexed(a: SimpleNamespace) -> list[int]:
    """Dimensions of the input that the indices name: a mask names as many as it has, an integer index one."""
    found: list[int] = []
    d = 0
    for one in a.indices:
        span = one.dim() if one is not None and one.dtype in (torch.bool, torch.uint8) else 1
        if one is not None:
            found += range(d, d + span)
        d += span
    return found


def _origins(a: SimpleNamespace, rank: int) -> list[int | None]:
    """For every dimension of what the indices pick, the dimension of the input that it is; None: it counts what was picked."""
    indexed = _indexed(a)
    kept = [d for d in range(a.input.dim()) if d not in indexed]
    together = indexed and indexed == list(range(indexed[0], indexed[-1] + 1))
    at = indexed[0] if together else 0
    return [*kept[:at], *[None] * (rank - len(kept)), *kept[at:]]


@rule("index_put", "_index_put_impl_", "index_put_")
def index_put(t: TraceState, a: SimpleNamespace, out: Tensor) -> None:
    """Dimensions that are written by index cannot be cut; the others are tied to the values, which are broadcast."""
    ids, values = list(t.ids(a.input)), t.ids(a.values)
    t.fix(ids, _indexed(a), _WRITTEN)
    masks = (torch.bool, torch.uint8)
    picked = max((1 if one.dtype in masks else one.dim() for one in a.indices if one is not None), default=0)
    origins = _origins(a, a.input.dim() - len(_indexed(a)) + picked)
    for v in range(1, a.values.dim() + 1):
        origin = origins[-v] if v <= len(origins) else None
        if origin is None:
            t.lock(values[-v], _WRITTEN)
        elif a.values.shape[-v] == a.input.shape[origin] > 1:
            ids[origin] = t.meet([ids[origin], values[-v]])
    t.set(out, ids)


@rule("index_select")
def index_select(t: TraceState, a: SimpleNamespace, out: Tensor) -> None:
    """The selected dimension cannot be cut; the others pass."""
    ids = list(t.ids(a.input))
    t.fix(ids, [a.dim], _READ)
    t.set(out, ids)


@rule("gather", "take_along_dim")
def gather(t: TraceState, a: SimpleNamespace, out: Tensor) -> None:
    """The gathered dimension cannot be cut; the others pass."""
    ids = list(t.ids(a.input))
    shorter = (d for d, column in enumerate(ids) if column is not None and out.shape[d] != len(column))
    t.fix(ids, {a.dim, *shorter}, _READ)
    t.set(out, ids)


@rule("index_add", "index_copy", "index_reduce", "index_fill")
def write_slices(t: TraceState, a: SimpleNamespace, out: Tensor) -> None:
    """Whole slices are added, copied or filled: the dimension of their numbers is fixed, the others are tied."""
    ids: list[Ids] = list(t.ids(a.input))
    source = list(t.ids(a.source)) if hasattr(a, "source") else None
    for d in range(len(ids)):
        if d == a.dim:
            for written in (ids, source) if source else (ids,):
                t.fix(written, [d], _WRITTEN)
        elif source:
            ids[d] = t.meet([ids[d], source[d]])
    t.set(out, ids)


@rule("masked_scatter")
def masked_scatter(t: TraceState, a: SimpleNamespace, out: Tensor) -> None:
    """Values in order where a mask says; rows of them keep their channels where the mask is the same for all channels."""
    ids, source, mask = list(t.ids(a.input)), list(t.ids(a.source)), t.ids(a.mask)
    rows = bool(ids and source and mask) and a.source.shape[-1] == a.input.shape[-1]
    if rows and (a.mask.shape[-1] == 1 or (mask[-1] is not None and (mask[-1] == FREE).all())):
        ids[-1] = t.meet([ids[-1], source.pop()])
        fixed = range(len(ids) - 1)
    else:
        fixed = range(len(ids))
    t.fix(ids, fixed, _WRITTEN)
    t.fix(source, range(len(source)), _WRITTEN)
    t.set(out, ids)


@rule("segment_reduce")
def segment_reduce(t: TraceState, a: SimpleNamespace, out: Tensor) -> None:
    """Runs of rows become one row each; the other dimensions pass."""
    ids = list(t.ids(a.data))
    t.fix(ids, [a.axis], "reduced in segments")
    t.set(out, ids)


@rule("scatter", "scatter_add", "scatter_reduce")
def scatter(t: TraceState, a: SimpleNamespace, out: Tensor) -> None:
    """Single values go where an index of the same rank says: fixed along one dimension, the others are tied.

    Along the others positions meet only where the index is as long as the input.
    """
    ids: list[Ids] = list(t.ids(a.input))
    written: list[Any] = [x for x in (getattr(a, "src", None), a.index) if isinstance(x, Tensor) and x.dim()]
    for d in range(len(ids)):
        columns = [ids[d], *(t.ids(x)[d] for x in written)]
        if d != a.dim and all(x.shape[d] == a.input.shape[d] for x in written):
            ids[d] = t.meet(columns)
            continue
        for column in columns:
            t.lock(column, _WRITTEN)
        ids[d] = None
    t.set(out, ids)
