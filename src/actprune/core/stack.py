"""Which modules are running: the path of the innermost one, also where it has just failed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import takewhile
from typing import Any

import torch
from torch import nn


@dataclass
class Frame:
    """One running call of a module."""

    path: str
    args: tuple[Any, ...] = ()
    """The call's arguments, those given by keyword last."""
    call: int = 0
    """How many calls of the module were made before this one."""
    contractions: int = 0
    """Contractions that the call has run itself, outside its children."""
    operators: int = 0
    """Operators that the call has run itself, outside its children."""
    reads: int = 0
    """How often the call has read values, or let them say how many are picked, itself."""
    met: bool = False
    """Whether the call's inputs were looked at."""
    unseen: list[str] = field(default_factory=list)
    """What the call runs past ``__call__``, innermost first: it called something that these hold, none of which runs."""

    @property
    def place(self) -> tuple[str, int, int]:
        """(module, call, operator) of the next operator."""
        return self.path, self.call, self.operators


_CONTAINERS = (nn.ModuleList, nn.ModuleDict, nn.Sequential)


def held_by(modules: Mapping[str, nn.Module], path: str) -> list[str]:
    """Paths of what a module holds, in lists, dicts and sequences too."""
    found = []
    for name in modules[path]._modules:
        child = f"{path}.{name}" if path else name
        if child in modules:  # else it has another path, or is None
            found += [child, *(held_by(modules, child) if type(modules[child]) in _CONTAINERS else ())]
    return found


def _holders(model: nn.Module) -> Iterator[tuple[str, list[str]]]:
    """(path, paths of what holds the module, innermost first, lists, dicts and sequences aside) of every module."""
    known: dict[str, list[str]] = {}
    for path, module in model.named_modules():
        around, _, name = path.rpartition(".")
        above = known[around] if name else []
        yield path, above
        known[path] = above if path and type(module) in _CONTAINERS else [path, *above]


@contextmanager
def module_stack(model: nn.Module, calls: Counter[str] | None = None) -> Iterator[list[Frame]]:
    """Yield the running calls, outermost first; after an exception the list stays as it was then.

    Args:
        model: the model.
        calls: counts how often each module is called, from nothing on.
    """
    stack = [Frame("")]
    calls = Counter() if calls is None else calls
    holders = dict(_holders(model))

    def enter(path: str, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if holders[path][:1] != [stack[-1].path]:
            running = {frame.path for frame in stack}
            stack[-1].unseen = list(takewhile(lambda holder: holder not in running, holders[path])) or stack[-1].unseen
        stack.append(Frame(path, (*args, *kwargs.values()), calls[path]))
        calls[path] += 1

    def leave(path: str, _module: nn.Module, _args: Any, _out: Any) -> None:
        if stack[-1].path == path:
            stack.pop()

    with ExitStack() as hooks:
        for path, module in model.named_modules():
            if isinstance(module, torch.jit.ScriptModule):  # takes no hooks: its operators count as those of what calls it
                continue
            hooks.callback(module.register_forward_pre_hook(partial(enter, path), prepend=True, with_kwargs=True).remove)
            hooks.callback(module.register_forward_hook(partial(leave, path)).remove)
        yield stack
