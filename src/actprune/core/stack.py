"""Which modules are running: the path of the innermost one, also where it has just failed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import nn


@dataclass
class Frame:
    """One running call of a module."""

    path: str
    args: tuple[Any, ...] = ()
    """The call's positional arguments."""
    contractions: int = 0
    """Contractions that the call has run itself, outside its children."""


@contextmanager
def module_stack(model: nn.Module) -> Iterator[list[Frame]]:
    """Yield the running calls, outermost first; after an exception the list stays as it was then."""
    paths = {module: path for path, module in model.named_modules()}
    stack = [Frame("")]

    def enter(module: nn.Module, args: tuple[Any, ...]) -> None:
        if module in paths:
            stack.append(Frame(paths[module], args))

    def leave(module: nn.Module, _args: Any, _out: Any) -> None:
        if module in paths and stack[-1].path == paths[module]:
            stack.pop()

    handles = [
        nn.modules.module.register_module_forward_pre_hook(enter),
        nn.modules.module.register_module_forward_hook(leave),
    ]
    try:
        yield stack
    finally:
        for handle in handles:
            handle.remove()
