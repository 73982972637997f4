"""Watch, or replace, what modules are given, with hooks that live only inside a ``with`` block."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from actprune.core.switches import EAGER, EVERY_MODULE

Watcher = Callable[[Tensor], Tensor | None]
"""Takes what is read; what it returns, unless None, is read in its place."""


@contextmanager
def uncompiled() -> Iterator[None]:
    """What is compiled runs eagerly inside the block, around a model too, and so does what PyTorch runs as one kernel.

    Otherwise hooks of what it holds would not fire, and forwards would not be called.
    """
    with EAGER.turned(), EVERY_MODULE.turned():
        yield


class Live:
    """A hook of one module: copied or pickled with it, it does nothing, for what a copy runs is not what is watched."""

    __slots__ = ("_hook",)

    def __init__(self, hook: Callable[..., Any]) -> None:
        self._hook = hook

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the hook."""
        return self._hook(*args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Live:
        return Live(_not_heard)

    def __reduce__(self) -> Any:
        return Live, (_not_heard,)


@contextmanager
def watch_inputs(model: nn.Module, watchers: Mapping[str, Watcher]) -> Iterator[None]:
    """Call ``watchers[path](x)`` with the first argument of every forward of the module at ``path``; packed, with its rows."""
    with ExitStack() as stack:
        for path, watcher in watchers.items():

            def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], watcher: Watcher = watcher) -> Any:
                read = args[0] if args else kwargs["input"]
                packed = isinstance(read, PackedSequence)
                other = watcher(read.data if packed else read)
                if other is None:
                    return None
                other = read._replace(data=other) if packed else other
                return ((other, *args[1:]), kwargs) if args else (args, {**kwargs, "input": other})

            handle = model.get_submodule(path).register_forward_pre_hook(Live(hook), with_kwargs=True)
            stack.callback(handle.remove)
        yield


class Ear:
    """Stands in for a module's forward and hears what it is given; copied or pickled with a module, it is the plain forward."""

    __slots__ = ("_before", "_forward", "watcher")

    def __init__(self, module: nn.Module, watcher: Callable[[Tensor], object]) -> None:
        self._forward, self.watcher = module.forward, watcher
        self._before = vars(module).get("forward")
        module.forward = self  # type: ignore[method-assign]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the module's forward once the watcher has seen the first argument."""
        self.watcher(args[0] if args else kwargs["input"])
        return self._forward(*args, **kwargs)

    def remove(self, module: nn.Module) -> None:
        """Hear nothing more, and leave what others put in the forward's place since: they may go in another order."""
        self.watcher = _not_heard
        outer = vars(module).get("forward")
        while isinstance(outer, Ear) and outer is not self and outer._forward is not self:
            outer = outer._forward
        if outer is self:
            put_back(module, "forward", self._before)
        elif isinstance(outer, Ear):
            outer._forward, outer._before = self._forward, self._before

    @property
    def __wrapped__(self) -> Callable[..., Any]:
        return self._forward

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return copy.deepcopy(self._forward, memo)

    def __reduce__(self) -> Any:
        return _itself, (self._forward,)


class _Around:
    """Stands in for a method and runs it inside a context; copied or pickled, it is the plain method."""

    def __init__(self, method: Callable[..., Any], context: Callable[[], AbstractContextManager[Any]]) -> None:
        self._method, self._context = method, context
        # who asks for the arguments looks through one wrapper, which may be there already
        self.__wrapped__ = getattr(method, "__wrapped__", method)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with self._context():
            return self._method(*args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return copy.deepcopy(self._method, memo)

    def __reduce__(self) -> Any:
        return _itself, (self._method,)


@contextmanager
def around(module: nn.Module, name: str, context: Callable[[], AbstractContextManager[Any]]) -> Iterator[None]:
    """Inside the block the module's method of that name runs inside the context each time."""
    before, method = vars(module).get(name), getattr(module, name)
    object.__setattr__(module, name, _Around(method, context))
    try:
        yield
    finally:
        put_back(module, name, before)


def put_back(module: nn.Module, name: str, value: Any) -> None:
    """Give an attribute of the instance its value again, or the class's own where the instance had none."""
    if value is None:
        vars(module).pop(name, None)
    else:
        object.__setattr__(module, name, value)


def _itself(forward: Any) -> Any:
    return forward


def _not_heard(*_: Any) -> None:
    pass


@contextmanager
def listening(model: nn.Module, watchers: Mapping[str, Callable[[Tensor], object]]) -> Iterator[dict[str, Ear]]:
    """Call ``watchers[path](x)`` with the first argument of every forward of the module at ``path``, packed sequences included.

    A hook per module would take longer than a small layer on a GPU. ``ear.watcher`` may be changed inside the block.
    """
    ears = {}
    with ExitStack() as stack:
        for path, watcher in watchers.items():
            module = model.get_submodule(path)
            ears[path] = ear = Ear(module, watcher)
            stack.callback(ear.remove, module)
        yield ears


def joined(watchers: list[Watcher], may_be_packed: bool) -> Callable[[Any], object]:
    """All watchers of one module as one; what may be a packed sequence is handed to them as its rows."""
    if len(watchers) == 1 and not may_be_packed:
        return watchers[0]

    def watch(x: Tensor | PackedSequence) -> None:
        for watcher in watchers:
            watcher(x.data if isinstance(x, PackedSequence) else x)

    return watch
