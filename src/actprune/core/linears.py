"""Hear operands of the contractions that a module runs itself without seeing all of its operators, where it calls ``F.linear``.

Where operators are seen one by one, each takes tens of microseconds, and PyTorch takes other ways: ``F.linear`` adds its bias
out of place. ``nn.MultiheadAttention`` and most layers with weights of their own call ``F.linear``, so the first forward tells
with which parameter it is called for which contraction, and from then on the call is heard by that parameter.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from threading import get_ident
from typing import Any, NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn

from actprune.core.hooks import Watcher
from actprune.core.operands import Operands, following

_Watchers = Mapping[tuple[int, int], list[Watcher]]
_PLAIN = (Tensor, nn.Parameter)


class _Weight(NamedTuple):
    """A parameter, or a view of one, wherever it lies when it is asked for."""

    owner: nn.Module
    name: str
    offset: int  # in bytes, of the parameter's own start
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    def is_now(self, weight: Tensor) -> bool:
        """Whether a tensor is it."""
        whole = self.owner._parameters.get(self.name)
        return (
            whole is not None
            and weight.shape == self.shape
            and weight.stride() == self.stride
            and weight.data_ptr() == whole.data_ptr() + self.offset
        )


class _Heard:
    """A module some of whose contractions are heard."""

    def __init__(self, watchers: _Watchers, weights: Mapping[int, tuple[nn.Module, str]]) -> None:
        self.watchers, self.weights = watchers, weights
        self.calls: list[tuple[_Weight, int, list[Watcher]]] = []
        """Weight, how many calls with it came before in a forward, who hears; empty while that is not known of all."""

    def start(self) -> _ByWeight | _ByOperator:
        """Follow one forward."""
        return _ByWeight(self) if self.calls else _ByOperator(self)

    def weight(self, weight: Any) -> _Weight | None:
        """Which part of which parameter a tensor is."""
        if type(weight) not in _PLAIN or not weight.numel():
            return None
        try:
            owner, name = self.weights[weight.untyped_storage().data_ptr()]
            offset = weight.data_ptr() - owner._parameters[name].data_ptr()  # type: ignore[union-attr]
        except (KeyError, RuntimeError, NotImplementedError):  # made in the forward; without memory of its own
            return None
        return _Weight(owner, name, offset, tuple(weight.shape), weight.stride())


class _ByOperator(Operands):
    """Hears operands operator by operator, and finds out which of them ``F.linear`` was given."""

    def __init__(self, heard: _Heard) -> None:
        super().__init__(heard.watchers)
        self._heard, self._thread = heard, get_ident()
        self._given: Tensor | None = None
        self._calls: dict[int, tuple[_Weight, int]] = {}

    def linear(self, plain: Callable[..., Tensor], x: Any, weight: Any, bias: Any) -> Tensor:
        if self._suspended or get_ident() != self._thread or type(x) not in _PLAIN:
            return plain(x, weight, bias)
        first, self._given = self.ordinal, x
        try:
            out = plain(x, weight, bias)
        finally:
            self._given = None
        if self.ordinal == first + 1 and (found := self._heard.weight(weight)) is not None:
            before = sum(other == found for other, _ in self._calls.values())
            self._calls[first] = found, before
        return out

    def read(self, x: Tensor, operand: int) -> Tensor:
        """What ``F.linear`` was given, before it was reshaped or cast, so that every forward is heard alike."""
        given = self._given
        is_given = given is not None and operand == 0 and given.shape[-1:] == x.shape[-1:] and given.numel() == x.numel()
        return given if given is not None and is_given else x

    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)
        if not self._suspended and all(operand == 0 and n in self._calls for n, operand in self.watchers):
            self._heard.calls = [(*self._calls[n], watchers) for (n, _), watchers in self.watchers.items()]


class _ByWeight:
    """Hears what ``F.linear`` is given by the weight it is called with."""

    def __init__(self, heard: _Heard) -> None:
        self._heard, self._thread = heard, get_ident()
        self._suspended = 0
        self._came = [0] * len(heard.calls)
        self._waiting = len(heard.calls)

    def linear(self, plain: Callable[..., Tensor], x: Any, weight: Any, bias: Any) -> Tensor:
        if not self._suspended and get_ident() == self._thread and type(weight) in _PLAIN:
            for k, (wanted, before, watchers) in enumerate(self._heard.calls):
                if wanted.is_now(weight):
                    if self._came[k] == before:
                        self._waiting -= 1
                        for watcher in watchers:
                            watcher(x)
                    self._came[k] += 1
        return plain(x, weight, bias)

    def __enter__(self) -> None:
        pass

    def __exit__(self, *exception: Any) -> None:
        if self._waiting:  # it failed, or runs otherwise than before: the next forward tells anew
            self._heard.calls = []

    def suspend(self) -> None:
        self._suspended += 1

    def resume(self) -> None:
        self._suspended -= 1


@contextmanager
def hear_operands(model: nn.Module, watchers: Mapping[str, _Watchers]) -> Iterator[None]:
    """Call watchers with operands of contractions that a module runs outside its children; what they return is ignored.

    Args:
        model: the model.
        watchers: module path -> (which contraction, 0 for its first factor or 1 for its second) -> watchers.

    Of an ``F.linear`` they hear what it is given, (..., channels), where ``watch_operands`` hands over its rows.
    """
    if not watchers:
        yield
        return
    weights = {
        p.untyped_storage().data_ptr(): (owner, name)
        for owner in model.modules()
        for name, p in owner._parameters.items()
        if type(p) is nn.Parameter and p.numel() and not p.is_meta
    }
    starts = {path: _Heard(of_module, weights).start for path, of_module in watchers.items()}
    plain = F.linear
    with following(model, starts) as running:

        @functools.wraps(plain)
        def linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
            if running and isinstance(running[-1], _ByOperator | _ByWeight):
                return running[-1].linear(plain, input, weight, bias)
            return plain(input, weight, bias)

        F.linear = linear  # type: ignore[assignment]
        try:
            yield
        finally:
            if F.linear is linear:  # else somebody put another around it, and it hears nothing any more
                F.linear = plain  # type: ignore[assignment]
