"""Hear operands of the contractions that a module runs itself without seeing all of its operators, where it calls ``F.linear``.

Where operators are seen one by one, each takes tens of microseconds, and PyTorch takes other ways: ``F.linear`` adds its bias
out of place. ``nn.MultiheadAttention`` and most layers with weights of their own call ``F.linear``, so the first forward tells
with which parameter it is called for which contraction, and from then on the call is heard by that parameter.
"""

from __future__ import annotations

import functools
import logging
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from threading import get_ident
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from actprune.core.followers import always, following
from actprune.core.hooks import Watcher
from actprune.core.operands import OfCall, Operands, Watchers, by_call
from actprune.core.switches import Switch
from actprune.core.tensors import is_ordinary

_LOG = logging.getLogger(__name__)

_Linear = Callable[..., Tensor]
_Owners = Mapping[int, list[tuple[nn.Module, str]]]
"""Address of memory -> which parameters lie there: modules and names."""


class _Weight(NamedTuple):
    """A parameter, or a view of one, wherever it lies when it is asked for."""

    places: tuple[tuple[nn.Module, str, int], ...]
    """Who owns it, by which name, and how many bytes behind the parameter's start; several of one that is shared."""
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    def is_now(self, weight: Tensor) -> bool:
        """Whether an ordinary tensor is it."""
        if weight.shape != self.shape or weight.stride() != self.stride:
            return False
        there = weight.data_ptr()
        wholes = ((owner._parameters.get(name), offset) for owner, name, offset in self.places)
        return any(is_ordinary(whole) and there == whole.data_ptr() + offset for whole, offset in wholes)


class _Call(NamedTuple):
    """A call that is heard."""

    weight: _Weight
    before: int
    """How many calls with this weight come before in a forward."""
    watchers: list[Watcher]


class _Heard:
    """A module some of whose contractions are heard."""

    def __init__(self, path: str, watchers: OfCall, owners: _Owners) -> None:
        self.path, self.watchers, self.owners = path, watchers, owners
        self.calls: list[_Call] | None = None
        """Those that are to be heard; None while that is not known of all."""
        self.varies = False
        """Whether forwards differ, so that every one is looked at."""

    def start(self) -> _ByOperator | _ByWeight:
        """Follow one forward."""
        return _ByOperator(self) if self.calls is None else _ByWeight(self, self.calls)

    def weight(self, weight: Tensor) -> _Weight | None:
        """Which part of which parameter an ordinary tensor is; None of one that was made in the forward."""
        places = tuple(
            (owner, name, weight.data_ptr() - whole.data_ptr())
            for owner, name in self.owners.get(weight.untyped_storage().data_ptr(), ())
            if is_ordinary(whole := owner._parameters.get(name))
        )
        return _Weight(places, tuple(weight.shape), weight.stride()) if places else None


class _ByOperator(Operands):
    """Hears operands operator by operator, and finds out which of them ``F.linear`` was given."""

    def __init__(self, heard: _Heard) -> None:
        super().__init__(heard.watchers)
        self._heard, self._thread = heard, get_ident()
        self._given: Tensor | None = None
        self._was_given = False
        self._came: Counter[tuple[object, ...]] = Counter()
        self._calls: dict[int, tuple[_Weight, int]] = {}

    def linear(self, plain: _Linear, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if self._suspended or get_ident() != self._thread:
            return plain(x, weight, bias)
        first, self._given, self._was_given = self.ordinal, x, False
        try:
            out = plain(x, weight, bias)
        finally:
            self._given = None
        if (found := self._heard.weight(weight)) is not None:
            same = (weight.data_ptr(), found.shape, found.stride)
            if self._was_given and self.ordinal == first + 1:
                self._calls[first] = found, self._came[same]
            self._came[same] += 1
        return out

    def read(self, x: Tensor, operand: int) -> Tensor:
        """What ``F.linear`` was given, before it was reshaped or cast, so that every forward is heard alike."""
        given = self._given
        if given is None or operand or given.dim() < 2 or given.shape[-1:] != x.shape[-1:] or given.numel() != x.numel():
            return x
        self._was_given = True
        return given

    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)
        heard, failed = self._heard, bool(exception[0])
        if self._suspended or failed or heard.varies:
            return
        if all(operand == 0 and n in self._calls for n, operand in heard.watchers):
            heard.calls = [_Call(*self._calls[n], watchers) for (n, _), watchers in heard.watchers.items()]


class _ByWeight:
    """Hears what ``F.linear`` is given by the weight it is called with."""

    def __init__(self, heard: _Heard, calls: list[_Call]) -> None:
        self._heard, self._calls, self._thread = heard, calls, get_ident()
        self._suspended = 0
        self._came = [0] * len(calls)
        self._waiting = len(calls)

    def linear(self, plain: _Linear, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if not self._suspended and get_ident() == self._thread:
            for k, call in enumerate(self._calls):
                if call.weight.is_now(weight):
                    if self._came[k] == call.before:
                        self._waiting -= 1
                        for watcher in call.watchers:
                            watcher(x)
                    self._came[k] += 1
        return plain(x, weight, bias)

    def __enter__(self) -> None:
        pass

    def __exit__(self, *exception: Any) -> None:
        if self._waiting and not exception[0]:
            self._heard.calls, self._heard.varies = None, True
            _LOG.warning(
                "%s: it multiplies by other weights than in its first forward, so that this forward was not heard there, or in "
                "part; from now on every operator is looked at, which takes longer",
                self._heard.path or "the model",
            )

    def suspend(self) -> None:
        self._suspended += 1

    def resume(self) -> None:
        self._suspended -= 1

    def abandon(self) -> None:
        pass


_RECORDINGS: list[list[_ByOperator | _ByWeight]] = []
"""What follows forwards now, of every recording that is on."""


@contextmanager
def _replaced() -> Iterator[None]:
    plain = F.linear

    @functools.wraps(plain)
    def linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        call: _Linear = plain
        if is_ordinary(input) and is_ordinary(weight):
            for running in tuple(_RECORDINGS):
                for innermost in running[-1:]:  # other threads call, too
                    call = functools.partial(innermost.linear, call)
            if not torch._C._len_torch_function_stack():
                return call(input, weight, bias)
        # who is asked by torch_function may compare with F.linear
        before, F.linear = F.linear, plain  # type: ignore[assignment]
        try:
            return call(input, weight, bias)
        finally:
            F.linear = before  # type: ignore[assignment]

    F.linear = linear  # type: ignore[assignment]
    try:
        yield
    finally:
        if F.linear is linear:  # else somebody put another around it, and it hears nothing any more
            F.linear = plain  # type: ignore[assignment]


_LINEAR = Switch(_replaced)
"""``F.linear`` tells recordings what it is given."""


@contextmanager
def hear_operands(
    model: nn.Module, watchers: Mapping[str, Watchers], is_on: Callable[[], bool] = always
) -> Iterator[Callable[[], None]]:
    """Call watchers with operands of contractions that a module runs outside its children; what they return is ignored.

    Args:
        model: the model.
        watchers: module path -> which contraction and factor -> watchers.
        is_on: whether a forward that begins is heard.

    Yields:
        What to call where a forward of the model begins, if that may be called by another way than ``model(...)``: it matters
        for modules whose calls differ.

    Of an ``F.linear`` they hear what it is given, (..., channels), where ``watch_operands`` hands over its rows. A module that
    calls it with other weights than in its first forward loses the first forward that differs, and the log says so.
    """
    if not watchers:
        yield lambda: None
        return
    owners = defaultdict(list)
    for owner in model.modules():
        for name, p in owner._parameters.items():
            if is_ordinary(p) and p.numel() and not p.is_meta:
                owners[p.untyped_storage().data_ptr()].append((owner, name))
    starts = {
        path: [_Heard(path, of_call, owners).start for of_call in by_call(of_module)] for path, of_module in watchers.items()
    }
    with _LINEAR.turned(), following(model, starts, is_on) as followers:
        _RECORDINGS.append(followers.running)
        try:
            yield followers.restart
        finally:
            _RECORDINGS[:] = [each for each in _RECORDINGS if each is not followers.running]
