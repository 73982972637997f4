"""Compare what a cut model runs, operator by operator, with what the trace predicts of it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence, Set
from contextlib import contextmanager
from math import isclose
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from actprune.core.numbers import LIFTED, heard, numbers
from actprune.core.operands import decomposed, is_composite
from actprune.core.stack import Frame
from actprune.core.values import NUMBER, Listing, as_fill, deciding, opaque, with_values
from actprune.graph import Graph
from actprune.graph.extents import Place
from actprune.graph.remains import VIEWS
from actprune.graph.told import next_read
from actprune.graph.weak import ByTensor
from actprune.pruning.telling import Telling, Tells

_PICKS = {"select", "view", "alias", "detach", "squeeze", "unsqueeze"}
_SUMS = {"sum", "linalg_vector_norm"}
_OF_A_NORM = VIEWS | {"sqrt", "rsqrt", "pow", "reciprocal", "clamp", "clamp_min", "maximum", "add", "mul", "div", "clone"}
"""What stands between the sum of a norm and the number that makes it one of a mean: ``normalize(x, dim=1) * C**0.5``."""
_COUNTABLE = 2**40


class ShapeError(Exception):
    """An operator produced other extents than the trace predicts."""


class NumberError(Exception):
    """An operator was given another number than in the trace: the code asked a width that is cut."""


class BranchError(Exception):
    """Other operators ran than in the trace: the code asked a width that is cut."""


class Checker(TorchDispatchMode):
    """Counts operators, how far a model got, and compares what they are given and produce with what the trace predicts.

    A reshape that infers an extent can take a wrong one without failing, and so can a scale that is computed from an extent.
    Where the code reads values it is told those of the trace, of what stays, and so are masks that pick: what is done otherwise
    than in the trace is done for a width, not for data. Tensors that sizes alone have made are read as they are. What cannot
    be told is measured: data may decide what runs from there on, and numbers of that call that do not change as a width does.
    Else calls that run other operators than the traced one did are let through from there on where PyTorch itself chooses by
    an extent that is 1 now, or a module has changed its class; and numbers that make a mean of a sum: a mean of what stays.

    Args:
        graph: the channel graph.
        gone: (n_classes,) which classes have left.
        stack: the running calls.
        others: paths of modules that have changed their class.
        compares: whether anything is compared.
        tells: what code is told that reads values.
    """

    def __init__(
        self,
        graph: Graph,
        gone: NDArray[np.bool_],
        stack: list[Frame],
        others: Set[str],
        compares: bool = True,
        tells: Tells = Tells.STAYS,
    ) -> None:
        super().__init__()
        self.n = self.right = 0
        self._compares = compares
        self._graph = graph
        self._stays = np.append(~gone, True)
        self._telling = Telling(graph.extents, self._stays, tells)
        self._stack = stack
        self._others = others
        self._decides = any(self._stays[group.classes].sum() == 1 < group.size for group in graph.groups)
        """Whether data may have decided what runs, or PyTorch, by an extent of 1; or anything has gone astray."""
        self._ran: Counter[tuple[str, int]] = Counter()
        self._kept: dict[int, int] = {}
        self._astray: set[tuple[str, int]] = set()
        self._measuring: set[tuple[str, int]] = set()
        self._summed: ByTensor[int] = ByTensor()
        self._decided: ByTensor[bool] = ByTensor()
        self._normed: ByTensor[int] = ByTensor()
        self._widths: ByTensor[str] = ByTensor()
        self._extents: set[tuple[int, int]] | None = None
        self._followed = False  # a number changed as a width does

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # noqa: D102
        func, args, kwargs = as_fill(func, args, kwargs or {})
        composite = is_composite(func)
        read = [] if composite else deciding(func, args)
        values, exact = self._values(read)
        try:
            out = decomposed(self, func, with_values(func, args, read, values) if read else args, kwargs)
        except Exception:
            self._asked(args)
            raise
        if composite:
            return out
        if self._compares:
            if opaque(func) and (results := _tensors(out)):
                values, known = self._values(results, results=True)
                exact &= known
                taken = dict(zip(map(id, results), values, strict=True))
                out = tree_map_only(Tensor, lambda x: taken[id(x)], out)
            if not exact:
                for tensor in _tensors(out):
                    self._decided[tensor] = True
            self._check(func.overloadpacket.__name__, args, numbers(func, args, kwargs), out)
            self._telling.dataless.follow(func, args, kwargs, out)
        self.n += 1  # an operator that gave a wrong shape was not got past
        return out

    def lists(self, tensor: Tensor) -> Tensor:
        """What a list or array is made of in place of a tensor."""
        if (told := self._widths.get(tensor)) is not None:
            raise NumberError(told)
        return self._values([tensor], listed=True)[0][0]

    def again(self, error: Exception | None) -> Tells | None:
        """What is told in another run, where one has failed for what was told, perhaps."""
        surely = isinstance(error, (ShapeError, NumberError, BranchError))
        return None if error is None or (self._followed and isinstance(error, NumberError)) else self._telling.then(surely)

    def _values(self, read: list[Tensor], listed: bool = False, results: bool = False) -> tuple[list[Tensor], bool]:
        """What is told in place of what is read; and whether no data can make a difference now, else they may from here on."""
        if not read or not self._compares:
            return read, True
        as_it_is = any(self._widths.each(read))
        values, exact = self._telling.values(next_read(self._stack[-1]), read, as_it_is, listed, results)
        if not exact:
            self._measuring.add(self._stack[-1].place[:2])
            self._decides = True
        return values, exact

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Watch operators, and what lists and arrays are made of."""
        with Listing(self.lists), self:
            yield

    def _check(self, ran: str, args: Any, given: tuple[float | complex, ...], out: Any) -> None:
        frame, extents = self._stack[-1], self._graph.extents
        place = frame.place
        call_, outputs = place[:2], _tensors(out)
        frame.operators += 1
        name, expected = extents.get(place, ("", ()))
        self._ran[call_] += 1
        if name != ran and call_ not in self._astray:
            self._strays(place, name, ran)
            self._astray.add(call_)
        self._follow_widths(ran, args, out)
        if ran in _SUMS and out.numel():
            self._summed[out] = args[0].numel() // out.numel()
        elif ran in VIEWS and (summed := self._summed.get(args[0])) is not None:
            self._summed[out] = summed
        elif ran.rstrip("_") in _OF_A_NORM and isinstance(out, Tensor):
            operands = [x for x in args if isinstance(x, Tensor)]
            counts = {n for of in (self._summed, self._normed) for n in of.each(operands) if n is not None}
            if len(counts) == 1:
                self._normed[out] = counts.pop()
        if call_ in self._astray:
            for tensor in outputs:
                self._decided[tensor] = True
        else:
            before = extents.numbers.get(place, ())
            if extents.counts_skipped(place):
                given, before = self._window(args, extents.skipped(place))
            if ran == "as_strided":
                given = heard(given, before)
            changed = repr(given) != repr(before)
            as_a_width = changed and self._as_a_width(given, before)
            changed = changed and (as_a_width or call_ not in self._measuring)
            if name == "native_group_norm" and changed and expected[0][1] is not None:
                changed = given != (self._whole_groups(expected[0][1], int(before[0].real)), *before[1:])
            summed = self._summed.get(args[0]) if place in extents.means else None
            if given == before and summed is not None and summed != extents.means[place]:
                raise NumberError(f"{name} makes no mean of {summed}: it is given {_listed(given)} as before")
            if changed and not self._counts(args, given, before):
                told = f"{name} is given {_listed(given)} instead of {_listed(before)}, a number that follows a width"
                self._followed = as_a_width
                if not (ran in LIFTED and out.numel() == 1 and not out.is_floating_point()):
                    raise NumberError(told)
                self._widths[out] = told
            for tensor, dims in zip(outputs, expected, strict=False):
                self._compare(name, tensor, dims)
            self._compare_fixed(place, args, outputs)

    def _counts(self, args: Any, given: tuple[float | complex, ...], before: tuple[float | complex, ...]) -> bool:
        """Whether a number counts what one of these tensors summed; or is its root, where it was divided by a norm."""
        return any(
            _is_count(n, given, before, powers)
            for of, powers in ((self._summed, (1, -1, 2, -2)), (self._normed, (2, -2)))
            for n in of.each(args)
            if n is not None
        )

    def _as_a_width(self, given: tuple[float | complex, ...], before: tuple[float | complex, ...]) -> bool:
        """Whether a number has changed as a width, its square or root did, or an inverse; an integer from width to width."""
        if self._extents is None:
            columns = {id(column): column for column in self._graph.columns.values()}.values()
            kept = {(self._extent(column), len(column)) for column in columns}
            self._extents = {(now, once) for now, once in kept if 0 < now < once}
        for now, once in zip(given, before, strict=False):
            if isinstance(now, int) and isinstance(once, int):
                if (now, once) in self._extents:
                    return True
            elif not isinstance(now, complex) and not isinstance(once, complex) and now != once and now * once > 0:
                powers = (1, -1, 2, -2, 0.5, -0.5)
                if any(isclose(now / once, (kept / full) ** power) for kept, full in self._extents for power in powers):
                    return True
        return False

    def _follow_widths(self, ran: str, args: Any, out: Any) -> None:
        """An integer tensor that holds a width may be read as a number again, which then is compared where it is used."""
        told = next((told for told in self._widths.each(_tensors(args)) if told), None) if len(self._widths) else None
        if told is not None and ran in _PICKS:
            self._widths[out] = told
        elif told is not None and ran != NUMBER:
            raise NumberError(told)

    def _strays(self, place: Place, name: str, ran: str) -> None:
        if place[0] not in self._others and not self._decides:
            raise BranchError(f"{ran} runs where {name or 'nothing'} ran before: a width decides")
        self._decides = True

    def missing(self) -> BranchError | None:
        """What the trace ran and the cut model did not, though nothing but a width can have decided."""
        if not self._compares or self._decides:
            return None
        due = Counter(place[:2] for place in self._graph.extents)
        for (path, number), n in due.items():
            if self._ran[path, number] < n:
                name, _ = self._graph.extents[path, number, self._ran[path, number]]
                return BranchError(f"{name} in {path or 'the model'} does not run any more: a width decides")
        return None

    def _asked(self, args: Sequence[Any]) -> None:
        """A view to several wrong extents needs as many repairs, each of which makes one right."""
        frame = self._stack[-1]
        sizes = next((x for x in args[1:] if isinstance(x, (list, tuple)) and all(type(n) is int for n in x)), ())
        _, expected = self._graph.extents.get(frame.place, ("", ()))
        if expected and len(expected[0]) == len(sizes) and (frame.path, frame.call) not in self._astray:
            known = ((n, column) for n, column in zip(sizes, expected[0], strict=True) if column is not None)
            self.right = sum(n == self._extent(column) for n, column in known)

    def _compare(self, name: str, tensor: Tensor, dims: Sequence[NDArray[np.int64] | None]) -> None:
        if tensor.dim() != len(dims):
            return
        due = [None if column is None else self._extent(column) for column in dims]
        for extent, expected in zip(tensor.shape, due, strict=True):
            if expected is not None and extent != expected and not _only_moved(tensor.shape, due):
                self.right = sum(n == e for n, e in zip(tensor.shape, due, strict=True))
                raise ShapeError(f"{name} gives shape {tuple(tensor.shape)}, with {expected} where {extent} stands")

    def _compare_fixed(self, place: Place, args: Any, outputs: list[Tensor]) -> None:
        """Extents that no cut changes; what data decide is let through, with all that is computed from it."""
        extents = self._graph.extents
        measured, unknown = place[:2] in self._measuring, None in extents.lengths[place]
        wrong = [
            (outputs[i], dim, extent)
            for i, dim, extent in extents.fixed(place)
            if i < len(outputs) and dim < outputs[i].dim() and outputs[i].shape[dim] != extent
            if not _only_moved(outputs[i].shape, self._due(place, i))
        ]
        if not wrong and not ((measured or unknown) and len(self._decided)):
            return
        # what is picked next may be as long by chance, and be given to another module than in the trace
        if (wrong and measured) or any(self._decided.each(_tensors(args))):
            for tensor in outputs:
                self._decided[tensor] = True
        elif wrong:
            tensor, dim, extent = wrong[0]
            shape = tuple(tensor.shape)
            raise ShapeError(
                f"{extents[place][0]} gives shape {shape}, with {shape[dim]} for {extent}: an extent that follows a width"
            )

    def _due(self, place: Place, output: int) -> list[int | None]:
        """Extents of an output, None where nothing is known."""
        extents = self._graph.extents
        due = [None if column is None else self._extent(column) for column in extents[place][1][output]]
        for i, dim, extent in extents.fixed(place):
            if i == output:
                due[dim] = extent
        return due

    def _window(
        self, args: Sequence[Any], skipped: NDArray[np.int64] | None
    ) -> tuple[tuple[float | complex, ...], tuple[float | complex, ...]]:
        """Where a window begins along what is cut, and how many of the positions before it stay."""
        if skipped is None:
            return (), ()
        x, dim, start = (*args, 0, None)[:3]
        return (slice(start, None).indices(x.shape[dim])[0],), (int(self._stays[skipped].sum()),)

    def _whole_groups(self, column: NDArray[np.int64], groups: int) -> int:
        """How many of the groups of a norm stay, where they are units: else all of them do."""
        rows = column.reshape(groups, -1)
        return int(self._stays[rows[:, 0]].sum()) if (rows == rows[:, :1]).all() else groups

    def _extent(self, column: NDArray[np.int64]) -> int:
        """How many of these positions stay."""
        if id(column) not in self._kept:
            self._kept[id(column)] = int(self._stays[column].sum())
        return self._kept[id(column)]


def _tensors(values: Any) -> list[Tensor]:
    return [x for x in tree_leaves(values) if isinstance(x, Tensor)]


def _is_count(n: int, given: Sequence[float | complex], before: Sequence[float | complex], powers: Sequence[int]) -> bool:
    """Whether one number changed from how many were summed to how many are (one less: of a variance), or a root of that."""
    if len(given) != 1 or len(before) != 1:
        return False
    now, once = given[0], before[0]
    if isinstance(now, complex) or isinstance(once, complex) or not (0 < now < _COUNTABLE and 0 < once < _COUNTABLE):
        return False
    roots = ((now**power, once**power) for power in powers)
    return any(
        round(full) > round(kept) >= 1
        and isclose(kept, round(kept))
        and isclose(full, round(full))
        and round(kept) in (n, n - 1)
        for kept, full in roots
    )


def _listed(values: Sequence[float | complex]) -> str:
    return ", ".join(f"{value:.4g}" for value in values)


def _only_moved(shape: Sequence[int], due: Sequence[int | None]) -> bool:
    """Whether an extent that became 1 explains the shape: einsum puts such dimensions elsewhere than others."""
    known = Counter(extent for extent in due if extent is not None)
    return 1 in due and not known - Counter(shape)
