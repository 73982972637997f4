"""Views: match input and output dimensions through their common refinement.

A view splits dimensions into factors and merges factors into dimensions. Split: exactly one factor stays cuttable and ids
are tied across the others: the factor on which the ids depend already; else the one that a head count names; else the last,
or another where that turns out to be unable to leave (``splits.py``).
Merge: ids are broadcast over the fixed factors.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from types import SimpleNamespace

import numpy as np
from torch import Tensor, nn

from actprune.graph.ids import FREE, Ids, free
from actprune.graph.records import Binding
from actprune.graph.rules.registry import rule
from actprune.graph.state import TraceState

_HEAD_WORDS = ("head", "d_kv", "key_value_proj_dim")
_WIDTH_WORDS = ("dim", "size", "channel", "width", "d_kv", "d_head", "per_head")


def _boundaries(shape: tuple[int, ...]) -> list[int]:
    """Products of trailing dimensions, from 1 up to the number of elements."""
    products = [1]
    for n in reversed(shape):
        products.append(products[-1] * n)
    return products


def _blocks(source: tuple[int, ...], target: tuple[int, ...]) -> list[tuple[int, int]]:
    """(lower, upper) boundary of every minimal block of equal product, innermost first."""
    common = sorted(set(_boundaries(source)) & set(_boundaries(target)))
    return list(zip(common[:-1], common[1:], strict=True))


def _factors(inside: list[int]) -> list[int] | None:
    """Refinement of a block, innermost first, or None where the boundaries do not divide each other."""
    factors = []
    for lower, upper in zip(inside[:-1], inside[1:], strict=True):
        if upper % lower:
            return None
        factors.append(upper // lower)
    return factors


def split(t: TraceState, ids: Ids, factors: list[int]) -> list[Ids]:
    """Ids of every factor (outermost first) of one split dimension; at most one is not fixed."""
    if ids is None or len(factors) == 1:
        return [ids] * len(factors) if len(factors) == 1 else [None] * len(factors)
    if (ids == FREE).all():
        return [free(n) for n in factors]
    grid = ids.reshape(factors)
    axes = [axis for axis, n in enumerate(factors) if n > 1]
    for axis in axes:
        if np.array_equal(grid, np.broadcast_to(_line(grid, axis), grid.shape)):
            return _only(grid, axis)
    place = t.frames[-1].place, tuple(factors)
    inward = any((*place, axis) in t.hints.stuck for axis in axes)
    axes = [axis for axis in axes if (*place, axis) not in t.hints.apart | t.hints.stuck] or axes
    heads = _head_axis(t, grid, axes)
    if heads is None and len(axes) > 1:
        t.guessed.add(t.frames[-1].path)
        chosen = axes[0] if inward else axes[-2] if t.frames[-1].path in t.hints.outer else axes[-1]
    else:
        chosen = axes[-1] if heads is None else heads
    t.tie_all(_merged_line(grid, chosen), grid, "split of a dimension that is partly fixed")
    found = _only(grid, chosen)
    kept = found[chosen]
    t.chosen[id(kept)] = kept, (*place, chosen)
    if heads is None and len(axes) > 1 and kept is not None:
        t.guesses.append((kept, len(t.space.locks)))
    return found


def _line(grid: np.ndarray, axis: int) -> np.ndarray:
    """The grid at index 0 of every other axis, kept broadcastable."""
    return grid[tuple(slice(None) if a == axis else slice(0, 1) for a in range(grid.ndim))]


def _merged_line(grid: np.ndarray, axis: int) -> np.ndarray:
    """Per position along ``axis`` any real id, so that a fixed first element does not hide the others."""
    others = tuple(a for a in range(grid.ndim) if a != axis)
    return grid.max(axis=others, keepdims=True)


def _only(grid: np.ndarray, axis: int) -> list[Ids]:
    line = _merged_line(grid, axis).ravel()
    return [line if a == axis else None for a in range(grid.ndim)]


def _head_axis(t: TraceState, grid: np.ndarray, axes: list[int]) -> int | None:
    """The factor that a running module names as its head count, or the one before what it names as a head's width.

    An attribute that holds the count will follow the cut. ``self.attention.forward(x)`` is no call of that module, so what the
    innermost module holds is asked, too, and what runs inside other calls in that way.
    """
    inner, *outer = reversed(t.stack)
    places = [(path, t.integers(path)) for path in (inner, *t.children(), *outer, *t.unseen)]
    for path, kept in (*places, (inner, t.settings(inner))):
        named = {n: v for n, v in kept if _speaks(n, _HEAD_WORDS)}
        counts = {n: v for n, v in named.items() if not _speaks(n, _WIDTH_WORDS)}
        axis = None
        for value in counts.values():
            matching = [a for a in axes if grid.shape[a] == value]
            if matching:
                # (3, 3, d) and (8, 8): heads come after the q/k/v factor and before the head's own width
                axis = next((a for a in reversed(matching) if a != axes[-1]), matching[-1])
                break
        else:
            if len(axes) > 1 and any(named[n] == grid.shape[axes[-1]] for n in named.keys() - counts.keys()):
                axis = axes[-2]
        if axis is not None:
            # heads that stand last are rare, and may be any number that happens to be the same: a rehearsal tells
            for name, value in counts.items() if axis != axes[-1] or len(axes) == 1 else ():
                if value == grid.shape[axis]:
                    t.bindings.append(Binding(path, name, None, _merged_line(grid, axis).ravel()))
            if path == inner:
                _bind_below(t, grid, axis)
            return axis
    return None


def _speaks(name: str, words: tuple[str, ...]) -> bool:
    """Whether a name holds one of these words."""
    return any(word in name for word in words)


def _bind_below(t: TraceState, grid: np.ndarray, axis: int) -> None:
    """Head counts of what the innermost module holds may be what was meant; where nothing needs them, a rehearsal tells."""
    for path in t.children() if axis != grid.ndim - 1 else ():
        for name, value in t.integers(path):
            if value == grid.shape[axis] and _speaks(name, _HEAD_WORDS) and not _speaks(name, _WIDTH_WORDS):
                t.bindings.append(Binding(path, name, None, _merged_line(grid, axis).ravel(), assumed=True))


def merge(t: TraceState, parts: list[Ids], factors: list[int]) -> Ids:
    """Ids of one dimension merged from factors (outermost first).

    What was broadcast follows what it meets; beside a fixed factor it does so at the same positions of every part.
    """
    if len(parts) == 1:
        return parts[0]
    cuttable = [axis for axis, ids in enumerate(parts) if ids is not None and factors[axis] > 1 and (ids >= 0).any()]
    if not cuttable:
        spread = [axis for axis, ids in enumerate(parts) if factors[axis] > 1 and ids is not None and (ids == FREE).all()]
        if not spread:
            return None
        if len(spread) == sum(n > 1 for n in factors):
            return free(math.prod(factors))
        parts, cuttable = list(parts), spread[-1:]
        parts[cuttable[0]] = t.space.fresh(factors[cuttable[0]])
    if len(cuttable) > 1:  # what is locked already asks for no more
        cuttable = [axis for axis in cuttable if not t.space.locked(parts[axis])] or cuttable
        met = [axis for axis in cuttable if id(parts[axis]) not in t.filled]
        cuttable = met or cuttable[::-1]  # of a state that is zero at first and has met nothing, samples stand first
    for axis in cuttable[1:]:
        t.lock(parts[axis], "merged with another cuttable dimension")
    axis = cuttable[0]
    shape = [1] * len(factors)
    shape[axis] = factors[axis]
    ids = parts[axis]
    assert ids is not None
    merged = np.broadcast_to(ids.reshape(shape), factors).ravel()
    t.flattened[id(merged)] = merged, (*factors[:axis], -1, *factors[axis + 1 :])
    return merged


def reshape(t: TraceState, x: list[Ids], source: tuple[int, ...], target: tuple[int, ...]) -> list[Ids]:
    """Ids after a view from ``source`` to ``target``."""
    result: list[Ids] = [None] * len(target)
    if math.prod(source) == 0:
        for ids in x:
            t.lock(ids, "view of an empty tensor")
        return result
    source_at, target_at = _boundaries(source), _boundaries(target)
    for lower, upper in _blocks(source, target):
        # dimension d (from the right) spans boundaries[d] .. boundaries[d + 1]; extent-1 dimensions span nothing
        inputs = [d for d in range(len(source)) if lower <= source_at[d] < source_at[d + 1] <= upper]
        outputs = [d for d in range(len(target)) if lower <= target_at[d] < target_at[d + 1] <= upper]
        inside = sorted({b for b in source_at + target_at if lower <= b <= upper})
        factors = _factors(inside)
        if factors is None:
            for d in inputs:
                t.lock(x[-1 - d], "view that does not divide evenly")
            continue
        pieces: list[Ids] = [None] * len(factors)  # innermost first
        for d in inputs:
            span = range(inside.index(source_at[d]), inside.index(source_at[d + 1]))
            split_ids = split(t, x[-1 - d], [factors[i] for i in reversed(span)])
            for i, ids in zip(reversed(span), split_ids, strict=True):
                pieces[i] = ids
        for d in outputs:
            span = range(inside.index(target_at[d]), inside.index(target_at[d + 1]))
            result[-1 - d] = merge(t, [pieces[i] for i in reversed(span)], [factors[i] for i in reversed(span)])
    return result


@rule("view", "_unsafe_view", "reshape", "_reshape_alias", "unsafe_view", "flatten", "unflatten")
def view(t: TraceState, a: SimpleNamespace, out: Tensor) -> None:
    """Any reshape; a view to another dtype of the same width too."""
    ids = list(t.ids(a.input))
    if a.input.shape != out.shape:
        ids = reshape(t, ids, tuple(a.input.shape), tuple(out.shape))
    _bind_extents(t, out.shape, ids)
    _bind_shape(t, out.shape, ids)
    t.set(out, ids)
    t.inherit(a.input, out)


def _bind_shape(t: TraceState, shape: Sequence[int], ids: list[Ids]) -> None:
    """What a view was called with may be a shape that a running module keeps."""
    for path, name, value in t.called():
        if not isinstance(value, (list, tuple)) or not 0 < len(value) <= len(shape):
            continue
        module = t.modules[path]
        if t.of_torch(path) and not isinstance(module, nn.Unflatten):
            continue
        if any(type(kept) is not int for kept in value):  # a list of tensors, for one: the anchors of a detector
            continue
        start = len(shape) - len(value)  # ``view(len(x), *self.shape)``
        if isinstance(module, nn.Unflatten):
            start = int(module.dim) % (start + 1)
        if all(kept in (extent, -1) for kept, extent in zip(value, shape[start:], strict=False)):
            found = ((index, ids[start + index]) for index, kept in enumerate(value) if kept != -1)
            t.possible += [Binding(path, name, index, column) for index, column in found if column is not None]


def _bind_extents(t: TraceState, shape: Sequence[int], ids: list[Ids]) -> None:
    """What a view was called with may be an integer of a running module, or an extent of the module's input."""
    frame = t.frames[-1]
    for n, column in zip(shape, ids, strict=True):
        if column is None or n == 1:
            continue
        for tensor in frame.args:
            for other in t.ids(tensor) if isinstance(tensor, Tensor) else ():
                if other is not None and len(other) == n and other is not column:
                    t.coincidences.setdefault(frame.path, []).append((column, other))
        t.may_count(column)


@rule("pixel_shuffle", "pixel_unshuffle")
def pixel_shuffle(t: TraceState, a: SimpleNamespace, out: Tensor) -> None:
    """``(C r^2, H, W) <-> (C, H r, W r)``: the channels of one output pixel block leave together."""
    x = t.ids(a.input)
    for ids in x[-2:]:
        t.lock(ids, "shuffled positions")
    wide, narrow = a.input.shape[-3], out.shape[-3]
    if wide >= narrow:
        kept = x[-3]
        if kept is not None:
            blocks = kept.reshape(narrow, wide // narrow)
            line = _merged_line(blocks, 0)
            t.tie_all(line, blocks, "pixel shuffle of a dimension that is partly fixed")
            kept = line.ravel()
    else:
        kept = None if x[-3] is None else np.repeat(x[-3], narrow // wide)
    t.set(out, [*x[:-3], kept, None, None])


@rule("native_channel_shuffle", "channel_shuffle")
def channel_shuffle(t: TraceState, a: SimpleNamespace, out: Tensor) -> None:
    """``(g, C / g) -> (C / g, g)``: every group keeps the same width, position ``i`` of all groups leaves together."""
    ids = list(t.ids(a.input))
    if ids[1] is not None:
        rows = ids[1].reshape(a.groups, -1)
        t.tie_all(rows[:1], rows, "channel shuffle")
        ids[1] = rows.T.ravel()
    t.set(out, ids)


@rule("im2col")
def im2col(t: TraceState, a: SimpleNamespace, out: Tensor) -> None:
    """``(C, H, W) -> (C kh kw, L)``: all taps of a channel leave together."""
    x = t.ids(a.input)
    for ids in x[-2:]:
        t.lock(ids, "unfolded positions")
    taps = math.prod(a.kernel_size)
    t.set(out, [*x[:-3], None if x[-3] is None else np.repeat(x[-3], taps), None])


@rule("col2im")
def col2im(t: TraceState, a: SimpleNamespace, out: Tensor) -> None:
    """``(C kh kw, L) -> (C, H, W)``: all taps of a channel leave together."""
    x = t.ids(a.input)
    channels = split(t, x[-2], [out.shape[-3], math.prod(a.kernel_size)])
    t.lock(channels[1], "taps of a fold")
    t.lock(x[-1], "folded positions")
    t.set(out, [*x[:-2], channels[0], None, None])
