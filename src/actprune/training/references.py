"""What else holds parameters of a network: optimizers that the module steps itself, lists that it or a callback made of them.

A cut, and a checkpoint of another shape, give a layer new parameters, and Lightning's optimizers are told. A list of the
parameters to regularise or to clip would go on holding the old ones, which no longer train, and nothing would fail: so builtin
containers and objects of other people's classes follow. What a closure or a slot holds is out of reach.
"""

from __future__ import annotations

from collections import OrderedDict, defaultdict, deque
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from types import ModuleType
from typing import Any
from weakref import ProxyTypes

from lightning import LightningModule, Trainer
from torch import Tensor, nn
from torch.optim import Optimizer

from actprune.surgery import with_wrapped

_OWN = frozenset(vars(LightningModule()))  # what Lightning and torch keep in every module
_DICTS, _LISTS = (dict, OrderedDict, defaultdict), (list, deque)
_CONTAINERS = frozenset({*_DICTS, *_LISTS, tuple, set})
_VALUES = frozenset({int, float, complex, bool, str, bytes, type(None)})
DEEPEST = 4
"""How many containers inside one another are looked through."""
_PACKAGES = ("builtins", "torch", "lightning", "torchmetrics", "numpy", "actprune")


def optimizers_of(trainer: Trainer, task: LightningModule) -> list[Optimizer]:
    """The trainer's optimizers, those that the LightningModule or a callback keeps, and those that these wrap; each once."""
    ours = {id(parameter) for parameter in task.parameters()}
    owners = (task, *trainer.callbacks)  # type: ignore[attr-defined]
    kept = [value for owner in owners for value in _leaves(_attributes(owner).values()) if isinstance(value, Optimizer)]
    theirs = [o for o in kept if any(id(p) in ours for group in o.param_groups for p in group["params"])]
    return with_wrapped([*trainer.optimizers, *theirs])


@contextmanager
def followed(task: LightningModule) -> Iterator[None]:
    """After the block, containers hold the parameters and buffers that took the place of others inside it.

    Looked through are the attributes of every module and callback, and lists, (named) tuples, sets, dicts and plain objects in
    them.
    """
    before = _named(task)
    yield
    after = _named(task)
    new = {id(old): after[name] for name, old in before.items() if name in after and after[name] is not old}
    renewal = _Renewal(new)
    callbacks = [] if task._trainer is None else task._trainer.callbacks  # type: ignore[attr-defined]
    for owner in (*task.modules(), *callbacks) if new else ():
        renewal.attributes(owner)


def _named(task: nn.Module) -> dict[str, Tensor]:
    parameters = dict(task.named_parameters(remove_duplicate=False))
    return {**parameters, **dict(task.named_buffers(remove_duplicate=False))}


def _attributes(owner: Any) -> dict[str, Any]:
    return {name: value for name, value in vars(owner).items() if name not in _OWN}


def _leaves(values: Iterable[Any], depth: int = DEEPEST) -> Iterator[Any]:
    for value in values:
        if type(value) not in _CONTAINERS:
            yield value
        elif depth:
            yield from _leaves(value.values() if isinstance(value, dict) else value, depth - 1)


class _Renewal:
    """Puts new tensors where old ones are held, with everything that holds them looked through once."""

    def __init__(self, new: Mapping[int, Tensor]) -> None:
        self._new = new
        self._done: dict[int, tuple[int, Any, Any]] = {}  # how deep was looked, the value (its id stays its own), the result

    def attributes(self, owner: Any, depth: int = DEEPEST) -> None:
        """Of an object: written past its properties and past what forbids it, for nothing new is said."""
        for name, value in _attributes(owner).items():
            renewed = self.of(value, depth)
            if renewed is not value:
                vars(owner)[name] = renewed

    def of(self, value: Any, depth: int) -> Any:
        """The value itself, changed in place where it can be; what takes its place where it cannot."""
        kind = type(value)
        if kind in _VALUES:
            return value
        if issubclass(kind, Tensor):
            return self._new.get(id(value), value)
        known = self._done.get(id(value))
        if known is not None and known[0] >= depth:
            return known[2]
        is_tuple = kind is tuple or (issubclass(kind, tuple) and hasattr(kind, "_make"))
        plain = not is_tuple and kind not in _CONTAINERS
        if not depth or (plain and not _is_plain(value)) or (is_tuple and all(type(item) in _VALUES for item in value)):
            return value
        self._done[id(value)] = (depth, value, value)  # what leads back here stops
        renewed = self._rebuilt(value, depth - 1) if is_tuple else value
        if plain:
            self.attributes(value, depth - 1)
        elif not is_tuple:
            self._change(value, depth - 1)
        self._done[id(value)] = (depth, value, renewed)
        return renewed

    def _rebuilt(self, value: Any, depth: int) -> Any:
        items = [self.of(item, depth) for item in value]
        if all(a is b for a, b in zip(items, value, strict=True)):
            return value
        return tuple(items) if type(value) is tuple else type(value)._make(items)

    def _change(self, value: Any, depth: int) -> None:
        if type(value) in _LISTS:
            changed = [(place, renewed) for place, item in enumerate(value) if (renewed := self.of(item, depth)) is not item]
            for place, renewed in changed:
                value[place] = renewed
            return
        is_dict = type(value) in _DICTS
        content = list(value.items()) if is_dict else [(item, None) for item in value]
        fresh = [(self.of(key, depth), self.of(item, depth)) for key, item in content]
        if any(a is not c or b is not d for (a, b), (c, d) in zip(content, fresh, strict=True)):
            value.clear()
            value.update(fresh if is_dict else [key for key, _ in fresh])


def _is_plain(value: Any) -> bool:
    """Whether it is an object of a class that somebody wrote for a training, not one of a package that looks after its own."""
    kind = type(value)
    if kind.__module__.partition(".")[0] in _PACKAGES or issubclass(kind, (type, ModuleType, nn.Module, Optimizer)):
        return False
    if kind in ProxyTypes:  # what it stands for is held elsewhere, or gone
        return False
    try:
        return type(vars(value)) is dict
    except Exception:  # it has no attributes, or is a proxy of a kind of its own with nothing behind it
        return False
