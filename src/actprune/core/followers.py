"""Follow the forwards of modules: a context around each, suspended while other modules run inside."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import nn

from actprune.core.hooks import Live
from actprune.core.switches import EVERY_MODULE

_LOG = logging.getLogger(__name__)


class Running(Protocol):
    """What follows one forward of a module: a context around it, suspended while another module runs inside."""

    def __enter__(self) -> Any: ...

    def __exit__(self, *exception: Any) -> Any: ...

    def suspend(self) -> None:
        """Another module runs from here on."""

    def resume(self) -> None:
        """The other module is done."""

    def abandon(self) -> None:
        """Nothing more comes of this forward, which did not end."""


AnyRunning = TypeVar("AnyRunning", bound=Running)


class Followers(Generic[AnyRunning]):
    """What follows forwards now."""

    def __init__(self, turns: Mapping[int, _Turns]) -> None:
        self.running: list[AnyRunning] = []
        """Of the forwards that have not ended, the innermost last."""
        self.turns = turns

    def restart(self) -> None:
        """The next call of every module is its first one in a forward of the model."""
        for turns in self.turns.values():
            turns.calls, turns.are_counted = 0, True


class _Turns:
    """Who follows the next call of a module."""

    def __init__(self, path: str, starts: Sequence[Callable[[], Any]]) -> None:
        self._path, self._starts = path, starts
        self._n_calls = len(starts) - 1
        self.calls = 0
        """In this forward of the model, or since the beginning where nobody says when one begins."""
        self.are_counted = False
        """Whether somebody says so."""
        self._has_told = False

    @property
    def differ(self) -> bool:
        """Whether it matters which call it is."""
        return self._n_calls > 0

    def next(self) -> Any:
        """Make the follower of the next call."""
        if not self.differ:
            return self._starts[0]()
        call = self.calls if self.are_counted else self.calls % self._n_calls
        self.calls += 1
        if call >= self._n_calls and not self._has_told:
            self._has_told = True
            _LOG.warning(
                "%s runs more often than the %d times that the trace saw, which ran different products; what it multiplies in "
                "further calls is not observed",
                self._path or "the model",
                self._n_calls,
            )
        return self._starts[min(call, self._n_calls)]()


def always() -> bool:
    """Whatever begins."""
    return True


@contextmanager
def following(
    model: nn.Module, starts: Mapping[str, Sequence[Callable[[], AnyRunning]]], is_on: Callable[[], bool] = always
) -> Iterator[Followers[AnyRunning]]:
    """Start one follower per forward of modules.

    Args:
        model: the model; its forward begins anew with the first call of every module.
        starts: module path -> what starts a follower; or, where calls differ, one for each of them in a forward of the model,
            and one for all that come after these.
        is_on: whether forwards that begin now are followed, and counted.
    """
    wanted = {id(model.get_submodule(path)): _Turns(path, of_path) for path, of_path in starts.items()}
    followers: Followers[AnyRunning] = Followers(wanted)
    if not starts:
        yield followers
        return
    with ExitStack() as stack:
        stack.enter_context(EVERY_MODULE.turned())
        for module in model.modules():  # whichever runs inside another counts for itself, also out of a list
            if isinstance(module, torch.jit.ScriptModule):  # takes no hooks; what it runs counts as its caller's own
                continue
            _follow(module, wanted.get(id(module)), followers.running, is_on, stack)
        if any(turns.differ for turns in wanted.values()):

            def begin(*_: Any) -> None:
                if is_on():
                    followers.restart()

            stack.callback(model.register_forward_pre_hook(Live(begin), prepend=True).remove)
        try:
            yield followers
        finally:
            while followers.running:  # after Ctrl-C, of which hooks are not told
                followers.running.pop().abandon()


def _follow(
    module: nn.Module,
    turns: _Turns | None,
    running: list[AnyRunning],
    is_on: Callable[[], bool],
    stack: ExitStack,
) -> None:
    entered: list[tuple[Running | None, BaseException | None, bool]] = []

    def enter(*_: Any) -> None:
        follows = turns is not None and is_on()
        entered.append((running[-1] if running else None, sys.exc_info()[1], follows))
        if running:
            running[-1].suspend()
        if turns is not None and follows:
            running.append(turns.next())
            running[-1].__enter__()

    def leave(*_: Any) -> None:
        if not entered:
            return
        around, before, follows = entered.pop()
        if follows:
            error = sys.exc_info()[1]  # a hook is not told of it
            error = None if error is before else error
            running.pop().__exit__(None if error is None else type(error), error, None)
        if around is not None:
            around.resume()

    # before other hooks, which may run contractions of their own: so the trace numbered them (a spectral norm, for one)
    stack.callback(module.register_forward_pre_hook(Live(enter), prepend=True).remove)
    stack.callback(module.register_forward_hook(Live(leave), always_call=True).remove)
