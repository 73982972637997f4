"""Compute once what several forwards of one batch have in common: everything before the first thing that differs.

One plain forward notes the output of every outermost module call that ends before one of the given modules is called.
Later forwards of the same batch hand these out instead of computing them. Nothing is assumed: a call whose output is written
to later (an addition in place) is computed again, and the first repeated forward is compared with the plain one, bit for bit;
where they differ (a model that draws, or that remembers its last call) every forward is computed whole.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from actprune.core.hooks import put_back

Forward = Callable[[], Any]
"""Runs the model on one batch and returns its output."""


@dataclass
class _Call:
    """A module call that has ended."""

    module: nn.Module
    output: Any
    versions: list[int]
    """How often each tensor of the output had been written to when the call ended."""
    inside: set[nn.Module] = field(default_factory=set)
    """The modules that it called."""

    @property
    def untouched(self) -> bool:
        return _versions(self.output) == self.versions


@contextmanager
def prefixed(model: nn.Module, first: Collection[str], forward: Forward) -> Iterator[tuple[Any, Forward]]:
    """Make repeated forwards of one batch compute only what follows the first call of one of the modules ``first``.

    Args:
        model: the model, in evaluation mode, without gradients and outside of inference mode.
        first: paths of modules.
        forward: the batch through the model.

    Yields:
        The output of the plain forward, and what to call instead of ``forward`` inside the block.
    """
    calls, output = _recorded(model, {model.get_submodule(path) for path in first}, forward)
    with _handed_out(_repeatable(calls), forward) as shorter:
        same = _equal(shorter(), output)
        if same:
            yield output, shorter
    if not same:
        yield output, forward


def _recorded(model: nn.Module, stops: set[nn.Module], forward: Forward) -> tuple[list[_Call], Any]:
    """The outermost calls that end before one of ``stops`` is called, and the output of the whole forward."""
    ended: list[_Call] = []
    running: list[tuple[nn.Module, int]] = []  # with the number of calls that had ended when this one began
    stopped = False

    def enter(module: nn.Module, _args: Any) -> None:
        nonlocal stopped
        stopped = stopped or module in stops
        running.append((module, len(ended)))

    def leave(module: nn.Module, _args: Any, output: Any) -> None:
        _, before = running.pop()
        if stopped:
            return
        parts = ended[before:]
        del ended[before:]
        inside = set().union(*({part.module} | part.inside for part in parts))
        ended.append(_Call(module, output, _versions(output), inside))

    with ExitStack() as stack:
        for module in model.modules():
            stack.callback(module.register_forward_pre_hook(enter, prepend=True).remove)
            stack.callback(module.register_forward_hook(leave).remove)
        output = forward()
    return ended, output


def _repeatable(calls: list[_Call]) -> dict[nn.Module, deque[Any]]:
    """Outputs to hand out, in the order of the calls; no module of which a call has to be computed again."""
    again: set[nn.Module] = set().union(*({call.module} | call.inside for call in calls if not call.untouched))
    kept: dict[nn.Module, deque[Any]] = {}
    for call in calls:
        if call.module not in again:
            kept.setdefault(call.module, deque()).append(call.output)
    return kept


@contextmanager
def _handed_out(kept: dict[nn.Module, deque[Any]], forward: Forward) -> Iterator[Forward]:
    """Inside the block, the first calls of these modules in every forward return what they returned before."""
    left: dict[nn.Module, deque[Any]] = {}

    def instead(module: nn.Module) -> Callable[..., Any]:
        plain = module.forward

        def handed(*args: Any, **kwargs: Any) -> Any:
            # a fresh container each time: the caller may change it
            return tree_map(lambda x: x, left[module].popleft()) if left[module] else plain(*args, **kwargs)

        return handed

    def shorter() -> Any:
        left.update({module: deque(outputs) for module, outputs in kept.items()})
        return forward()

    own = {module: vars(module).get("forward") for module in kept}
    try:
        for module in kept:
            module.forward = instead(module)  # type: ignore[method-assign]
        yield shorter
    finally:
        for module, before in own.items():
            put_back(module, "forward", before)


def _versions(output: Any) -> list[int]:
    return [x._version for x in tree_leaves(output) if isinstance(x, Tensor)]


def _equal(one: Any, other: Any) -> bool:
    pairs = zip(tree_leaves(one), tree_leaves(other), strict=True)
    return all(torch.equal(a, b) if isinstance(a, Tensor) else a == b for a, b in pairs)
