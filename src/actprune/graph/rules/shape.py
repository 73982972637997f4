"""Operators that move, pick, join or repeat positions: plain array operations on ids."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from operator import is_
from types import SimpleNamespace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from actprune.graph.ids import FIXED, Ids, Joined, free
from actprune.graph.records import Binding
from actprune.graph.rules.registry import rule
from actprune.graph.state import TraceState


@rule("t")
def matrix_transpose(t: TraceState, a: SimpleNamespace, out: Tensor) -> None:
    """Reverse the dimensions."""
    t.set(out, t.ids(a.input)[::-1])
    t.inherit(a.input, out)


@rule("transpose", "transpose_")
def transpose(t: TraceState, a: SimpleNamespace, out: Tensor) -> None:
    """Swap two dimensions."""
    ids = list(t.ids(a.input))
    if ids:
        ids[a.dim0], ids[a.dim1] = ids[a.dim1], ids[a.dim0]
    t.set(out, ids)
    t.inherit(a.input, out)


@rule("permute")
def permute(t: TraceState, a: SimpleNamespace, out: Tensor) -> None:
    """Reorder the dimensions."""
    ids = t.ids(a.input)
    t.set(out, [ids[d] for d in a.dims])
    t.inherit(a.input, out)


@rule("unsqueeze", "unsqueeze_")
def unsqueeze(t: TraceState, a: SimpleNamespace, out: Tensor) -> None:
    """A new dimension of extent 1."""
    ids = list(t.ids(a.input))
    ids.insert(a.dim if a.dim >= 0 else a.dim + out.dim(), None)
    t.set(out, ids)
    t.inherit(a.input, out)


@rule("squeeze", "squeeze_")
def squeeze(t: TraceState, a: SimpleNamespace, out: Tensor) -> None:
    """Dimensions of extent 1 go; in place, ``before`` says what there was."""
    shape, dims = getattr(a, "before", a.input).shape, getattr(a, "dim", None)
    chosen = range(len(shape)) if dims is None else [dims] if isinstance(dims, int) else dims
    gone = {d % len(shape) for d in chosen if shape[d] == 1} if shape else set()
    t.set(out, [ids for d, ids in enumerate(t.ids(a.input)) if d not in gone])
    t.inherit(a.input, out)


@rule("expand")
def expand(t: TraceState, a: SimpleNamespace, out: Tensor) -> None:
    """Broadcast positions follow whatever they meet."""
    x = t.ids(a.input)
    result: list[Ids] = []
    for dim in range(-out.dim(), 0):
        present = a.input.dim() >= -dim
        if present and a.input.shape[dim] == out.shape[dim]:
            result.append(x[dim])
        else:
            result.append(free(out.shape[dim]))
    t.set(out, result)
    t.inherit(a.input, out)


@rule("select")
def select(t: TraceState, a: SimpleNamespace, out: Tensor) -> None:
    """One position of a dimension: that dimension cannot be cut, unless nobody looks at the values."""
    ids = list(t.ids(a.input))
    picked = ids.pop(a.dim)
    t.pick(picked)
    t.set(out, ids)
    t.lock_once_read(out, picked, "select on this dimension")


@rule("unbind")
def unbind(t: TraceState, a: SimpleNamespace, out: Sequence[Tensor]) -> None:
    """Every position of a dimension by itself: that dimension cannot be cut."""
    ids = list(t.ids(a.input))
    picked = ids.pop(a.dim)
    t.pick(picked)
    t.lock(picked, "unbind of this dimension")
    for tensor in out:
        t.set(tensor, ids)


@rule("diagonal")
def diagonal(t: TraceState, a: SimpleNamespace, out: Tensor) -> None:
    """Row and column of the same number: they leave together where the matrix is square and its own diagonal is taken."""
    ids, rank = list(t.ids(a.input)), a.input.dim()
    one, other = a.dim1 % rank, a.dim2 % rank
    if a.offset == 0 and a.input.shape[one] == a.input.shape[other]:
        met = t.meet([ids[one], ids[other]])
    else:
        t.fix(ids, (one, other), "diagonal of this dimension")
        met = None
    t.set(out, [*(column for d, column in enumerate(ids) if d not in (one, other)), met])


@rule("cat")
def cat(t: TraceState, a: SimpleNamespace, out: Tensor) -> None:
    """Ids are concatenated along the dimension and tied along the others."""
    tensors, dim = a.tensors, a.dim % out.dim()
    every: list[list[Ids]] = []
    extents: list[int] = []
    if t.joined is not None and t.joined.begins(dim, tensors):
        tensors = tensors[len(t.joined.tensors) :]
        every, extents = [t.joined.ids], [t.joined.extent]
    every += t.ids_of(tensors)
    if any(len(ids) != out.dim() for ids in every):  # no detections at all: one empty dimension
        tensors = [x for x in a.tensors if x.dim() == out.dim()]
        every, extents = t.ids_of(tensors), []
    result: list[Ids] = []
    for d, columns in enumerate(zip(*every, strict=True)):
        if d != dim:
            result.append(t.meet(columns))
        elif not any(map(is_, columns, itertools.repeat(None))):
            result.append(np.concatenate(columns))
        elif all(map(is_, columns, itertools.repeat(None))):
            result.append(None)
        else:
            extents += [x.shape[d] for x in tensors]
            filled = [np.full(n, FIXED) if ids is None else ids for n, ids in zip(extents, columns, strict=True)]
            result.append(np.concatenate(filled))
    t.set(out, result)
    t.joined = Joined(dim, a.tensors, result, out.shape[dim])


@rule("stack")
def stack(t: TraceState, a: SimpleNamespace, out: Tensor) -> None:
    """A new fixed dimension; the others are tied."""
    ids = [t.meet(columns) for columns in zip(*t.ids_of(a.tensors), strict=True)]
    ids.insert(a.dim % out.dim(), None)
    t.set(out, ids)


@rule("repeat")
def repeat(t: TraceState, a: SimpleNamespace, out: Tensor) -> None:
    """Positions are tiled; a repeated dimension of extent 1 follows whatever it meets."""
    x: list[Ids] = [*(None for _ in range(out.dim() - a.input.dim())), *t.ids(a.input)]
    extents = [1] * (out.dim() - a.input.dim()) + list(a.input.shape)
    result: list[Ids] = []
    for ids, n, times in zip(x, extents, a.repeats, strict=True):
        if times == 1:
            result.append(ids)
        elif n == 1:
            result.append(free(times))
        else:
            result.append(None if ids is None else np.tile(ids, times))
    t.set(out, result)


@rule("constant_pad_nd")
def pad(t: TraceState, a: SimpleNamespace, out: Tensor) -> None:
    """Padding a cuttable dimension adds positions that are fixed, unless a module attribute keeps the padding."""
    result: list[Ids] = list(t.ids(a.input))
    kept = _pad_attribute(t, list(a.pad))
    for pair in range(len(a.pad) // 2):
        dim = -1 - pair
        before, after = a.pad[2 * pair], a.pad[2 * pair + 1]
        ids = result[dim]
        if before == after == 0 or ids is None:
            continue
        t.skips(None)
        if before < 0 or after < 0:
            t.lock(ids, "negative padding")
            result[dim] = None
            continue
        sides = []
        for index, n in ((2 * pair, before), (2 * pair + 1, after)):
            if kept is None:
                sides.append(np.full(n, FIXED))
            else:
                sides.append(t.space.fresh(n))
                t.bindings.append(Binding(*kept, index, sides[-1]))
        result[dim] = np.concatenate([sides[0], ids, sides[1]])
    t.set(out, result)


def _pad_attribute(t: TraceState, pad: list[int]) -> tuple[str, str] | None:
    for path, name, value in t.attributes():
        if isinstance(value, (list, tuple)) and list(value) == pad:
            return path, name
    return None


@rule("as_strided")
def as_strided(t: TraceState, a: SimpleNamespace, out: Tensor) -> None:
    """A dimension passes where one dimension of the result walks along it, if a rehearsed cut can tell that it still does.

    It compares steps with those of the tensor, dimension by dimension. Where the view has more or fewer, it compares the steps
    themselves, which do not change with the outermost extent. In training mode it compares nothing.
    """
    x, ids = a.input, t.ids(a.input)
    if _layout(x) == _layout(out):
        t.set(out, ids)
        return
    result: list[Ids] = [None] * out.dim()
    path = t.frames[-1].path
    compared = not t.training or any(place[0] == path and name == "as_strided" for place, (name, _) in t.produced_ids.items())
    for dim, column in enumerate(ids):
        if column is None:
            continue
        walks = _walks(x, out, dim) if compared and out.numel() else None
        follows = walks == dim if x.dim() == out.dim() else x.stride(dim) == max(x.stride())
        if walks is None or not follows:
            t.lock(column, "as_strided to another shape")
        else:
            result[walks] = column
    t.set(out, result)


@rule("as_strided_")
def restride(t: TraceState, a: SimpleNamespace, out: Tensor) -> None:
    """PyTorch itself changes no more than the step along single positions; else nothing of the tensor is known any more."""
    if _layout(a.before) != _layout(out):
        for ids in t.ids(a.input):
            t.lock(ids, "as_strided in place")
        t.set(out, [None] * out.dim())


def _layout(x: Tensor) -> tuple[torch.Size, int | torch.SymInt, list[int]]:
    """Where every element lies: shape, offset, and the steps along more than one position."""
    return x.shape, x.storage_offset(), [step for n, step in zip(x.shape, x.stride(), strict=True) if n > 1]


def _walks(x: Tensor, view: Tensor, dim: int) -> int | None:
    """The dimension of a view of ``x`` that walks along a dimension of ``x``, position by position; None: there is none."""
    first = min(x.storage_offset(), view.storage_offset())
    reach = (sum((n - 1) * step for n, step in zip(y.shape, y.stride(), strict=True)) + y.storage_offset() for y in (x, view))
    positions = np.full(max(reach) + 1 - first, -1)

    def seen(tensor: Tensor) -> NDArray[np.int64]:
        strides = [positions.itemsize * stride for stride in tensor.stride()]
        return np.lib.stride_tricks.as_strided(positions[tensor.storage_offset() - first :], tensor.shape, strides)

    def along(tensor: Tensor, d: int) -> NDArray[np.int64]:
        return np.arange(tensor.shape[d]).reshape(-1, *[1] * (tensor.dim() - d - 1))

    seen(x)[...] = along(x, dim)
    same = (d for d, n in enumerate(view.shape) if n == x.shape[dim])
    return next((d for d in same if (seen(view) == along(view, d)).all()), None)


@rule("flip")
def flip(t: TraceState, a: SimpleNamespace, out: Tensor) -> None:
    """Reverse positions."""
    ids = list(t.ids(a.input))
    for dim in a.dims:
        ids[dim] = None if ids[dim] is None else ids[dim][::-1]
    t.set(out, ids)


@rule("roll")
def roll(t: TraceState, a: SimpleNamespace, out: Tensor) -> None:
    """Shifting a cuttable dimension by a fixed number of positions locks it."""
    ids = list(t.ids(a.input))
    for dim in a.dims or range(len(ids)):
        t.lock(ids[dim], "roll of this dimension")
    t.set(out, ids)


@rule("unfold")
def unfold(t: TraceState, a: SimpleNamespace, out: Tensor) -> None:
    """Sliding windows over a dimension fix it; the others pass."""
    ids = list(t.ids(a.input))
    if ids:
        t.fix(ids, [a.dimension], "windows over this dimension")
    t.set(out, [*ids, None])
