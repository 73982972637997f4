"""Parts of a dimension: slices, splits and chunks. A part can be cut where the code keeps its size in an attribute."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from types import SimpleNamespace

import numpy as np
from torch import Tensor, nn

from actprune.graph.ids import Ids
from actprune.graph.records import Binding
from actprune.graph.rules.registry import rule
from actprune.graph.state import TraceState

# what nobody takes for a kernel, a window or a head count of the same value
_PART_WORDS = ("dim", "channel", "width", "hidden", "feature", "plane", "filter")


@rule("slice")
def slice_(t: TraceState, a: SimpleNamespace, out: Tensor) -> None:
    """A range of positions: halves, thirds and quarters leave evenly, other ranges need bounds that the module keeps.

    Every ``step``-th position: neighbours leave together, so that each keeps its place among them.
    """
    ids = list(t.ids(a.input))
    n, dim = a.input.shape[a.dim], a.dim
    start, stop, step = slice(a.start, a.end, a.step).indices(n)
    whole = ids[dim]
    if whole is not None and step == 1:
        t.skips(whole[:start])
    if whole is not None and out.shape[dim] != n:
        if step > 1 and start < step and stop == n and n % step == 0:
            neighbours = whole.reshape(-1, step)
            t.tie_all(neighbours[:, :1], neighbours)
        elif step > 1 or not _bind_range(t, whole, start, stop):
            t.skips(None)
            t.set(out, [None if d == dim else column for d, column in enumerate(ids)])
            t.lock_once_read(out, whole, "slice of this dimension by position")
            return
        ids[dim] = whole[start:stop:step]
    t.set(out, ids)
    if out.shape[dim] == n:
        t.inherit(a.input, out)


def _bind_range(t: TraceState, ids: np.ndarray, start: int, stop: int) -> bool:
    """Let a range follow a cut, if its bounds are kept by a module, or it is one of a few equal parts."""
    parts = _parts(len(ids), start, stop)
    evenly = parts == 2 or (parts and start > 0 and stop < len(ids))
    if not evenly and _bind_bounds(t, ids, {start, stop} - {0, len(ids)}):
        return True
    if parts:
        _leave_evenly(t, ids, [stop - start] * parts, "")
    return bool(parts)


def _parts(n: int, start: int, stop: int) -> int:
    """2, 3 or 4 where a range is one of so many equal parts of ``n`` (queries, keys and values, packed); else 0."""
    size = stop - start
    return n // size if size and n % size == 0 and start % size == 0 and n // size in (2, 3, 4) else 0


@rule("split", "unsafe_split", "unsafe_chunk")
def split_evenly(t: TraceState, a: SimpleNamespace, out: Sequence[Tensor]) -> None:
    """Equal parts: position ``i`` of every part leaves together. A shorter last part locks the dimension."""
    whole, dim = t.ids(a.input), a.dim
    ids = whole[dim]
    sizes = [tensor.shape[dim] for tensor in out]
    if ids is not None and len(sizes) > 1:
        _leave_evenly(t, ids, sizes, "split into unequal parts")
    _set_parts(t, whole, dim, sizes, out)


@rule("split_with_sizes", "unsafe_split_with_sizes")
def split_by_sizes(t: TraceState, a: SimpleNamespace, out: Sequence[Tensor]) -> None:
    """Parts of given sizes: each part is cut by itself where a module keeps the sizes, else all evenly or not at all."""
    whole, dim = t.ids(a.input), a.dim
    ids = whole[dim]
    sizes = [tensor.shape[dim] for tensor in out]
    if ids is not None and sizes == [sizes[0], 2 * sizes[0]] and isinstance(t.modules[t.stack[-1]], nn.MultiheadAttention):
        # queries beside keys and values, packed: three parts, whatever the module's own code calls them
        _leave_evenly(t, ids, [sizes[0]] * 3, "")
    elif (
        ids is not None
        and len(sizes) > 1
        and not any(bind(t, sizes, ids) for bind in (_bind_list, _of_the_input, _bind_integers))
    ):
        _leave_evenly(t, ids, sizes, "split into unequal parts, not each kept by one attribute")
    _set_parts(t, whole, dim, sizes, out)


def _of_the_input(t: TraceState, sizes: list[int], ids: np.ndarray) -> bool:
    """Unequal parts as wide as something the module is given may have been asked of that; the others stay.

    A rehearsal tells: sizes that do not add up fail.
    """
    if len(set(sizes)) == 1:
        return False
    given = [c for x in t.frames[-1].args if isinstance(x, Tensor) for c in t.ids(x) if c is not None]
    ends = np.cumsum(sizes)
    parts = [(ids[end - size : end], [c for c in given if len(c) == size > 1]) for size, end in zip(sizes, ends, strict=True)]
    if not any(same for _, same in parts):
        return False
    for part, same in parts:
        t.coincidences.setdefault(t.frames[-1].path, []).extend((part, column) for column in same)
        if not same:
            t.lock(part, "part whose size nothing names")
    return True


def _leave_evenly(t: TraceState, ids: np.ndarray, sizes: list[int], why: str) -> None:
    """Position ``i`` of every part leaves together; unequal parts are locked."""
    if len(set(sizes)) > 1:
        t.lock(ids, why)
        return
    parts = ids.reshape(len(sizes), -1)
    t.tie_all(parts[:1], parts)
    _bind_sizes(t, sizes[0], parts[0])


def _set_parts(t: TraceState, whole: list[Ids], dim: int, sizes: list[int], out: Sequence[Tensor]) -> None:
    ends = np.cumsum(sizes).tolist()
    for size, end, tensor in zip(sizes, ends, out, strict=True):
        part = list(whole)
        ids = whole[dim]
        part[dim] = None if ids is None else ids[end - size : end]
        t.set(tensor, part)


def _bind_sizes(t: TraceState, size: int, counts: np.ndarray) -> None:
    """An integer of the innermost module, or of what runs there past its call, may be what the split was called with."""
    for path in (t.stack[-1], *t.unseen):
        t.possible += [Binding(path, name, None, counts) for name, n in (*t.integers(path), *t.settings(path)) if n == size]


def _bind_list(t: TraceState, sizes: list[int], ids: np.ndarray) -> bool:
    for path, name, value in t.attributes():
        if isinstance(value, (list, tuple)) and list(value) == sizes:
            starts = np.cumsum([0, *sizes[:-1]]).tolist()
            for index, (start, size) in enumerate(zip(starts, sizes, strict=True)):
                t.bindings.append(Binding(path, name, index, ids[start : start + size]))
            return True
    return False


def _bind_integers(t: TraceState, sizes: list[int], ids: np.ndarray) -> bool:
    """Unequal parts, each as wide as one integer of the running module or of one it holds; one part may be what is left.

    Parts of one size are named by one integer, so position ``i`` of every one of them leaves together. All follow at once, for
    sizes that do not add up fail; a rehearsal then finds those that are equal by chance.
    """
    if len(set(sizes)) == 1 or t.of_torch(t.stack[-1]):
        return False
    return _bind_widths(t, sizes, ids) or _bind_every(t, sizes, ids)


def _bind_every(t: TraceState, sizes: list[int], ids: np.ndarray) -> bool:
    """Every part is as wide as one integer of the running module, whatever that is called (``dt_rank``, ``d_state``)."""
    found = {size: [name for name, n in t.integers(t.stack[-1]) if n == size] for size in set(sizes)}
    if any(len(names) != 1 for names in found.values()):
        return False
    ends = np.cumsum(sizes)
    for size, (name, *_) in found.items():
        alike = [ids[end - size : end] for n, end in zip(sizes, ends, strict=True) if n == size]
        t.tie_all(alike[0][None], np.stack(alike))
        t.bindings.append(Binding(t.stack[-1], name, None, alike[0], assumed=True))
    return True


def _bind_widths(t: TraceState, sizes: list[int], ids: np.ndarray) -> bool:
    """The integers are called widths; at most one part is what is left."""
    parts: dict[int, list[np.ndarray]] = {}
    for size, end in zip(sizes, np.cumsum(sizes), strict=True):
        parts.setdefault(size, []).append(ids[end - size : end])
    named = {size: _named(t, size) for size in [*parts, len(ids)]}
    rest = [size for size in parts if not named[size]]
    if rest:
        if len(rest) > 1 or len(parts.pop(rest[0])) > 1:
            return False
        if named[len(ids)]:  # else it may have been asked of the tensor itself
            parts[len(ids)] = [ids]
    if any(len(named[size]) != 1 for size in parts):
        return False
    for size, alike in parts.items():
        t.tie_all(alike[0][None], np.stack(alike))
        t.bindings.append(Binding(*named[size][0], None, alike[0], assumed=True))
    return True


def _named(t: TraceState, n: int) -> list[tuple[str, str]]:
    """(module, attribute) of widths that are ``n``: of the innermost module, else of those it holds."""
    path = t.stack[-1]

    def of(owner: str, kept: Iterable[tuple[str, int]]) -> list[tuple[str, str]]:
        widths = (name for name, value in kept if value == n)
        return [(owner, name) for name in widths if any(word in name for word in _PART_WORDS)]

    below = [owner for owner in t.children() if not t.of_torch(owner)]
    return (
        of(path, t.integers(path))
        or [found for owner in below for found in of(owner, t.integers(owner))]
        or of(path, t.settings(path))
    )


def _keepers(t: TraceState, n: int) -> list[str]:
    """Names of integers of the innermost module, which somebody else wrote, that are ``n`` and count nothing yet."""
    path = t.stack[-1]
    if t.of_torch(path):
        return []
    taken = {one.attribute for one in t.bindings if one.module == path}
    return [name for name, value in t.integers(path) if value == n and name not in taken]


def _bind_bounds(t: TraceState, ids: np.ndarray, bounds: set[int]) -> bool:
    """Bounds may follow the cut where an integer counts what is before or behind them; a rehearsal tells: 4 may be any 4."""
    found = []
    for bound in bounds:
        named = [(name, side) for side in (ids[:bound], ids[bound:]) for name in _keepers(t, len(side))]
        if not named:
            return False
        found += named
    t.possible += [Binding(t.stack[-1], name, None, counts) for name, counts in found]
    return True
