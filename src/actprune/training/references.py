"""What else holds parameters of a network: optimizers that the module steps itself, lists that it or a callback made of them.

A cut gives a layer new parameters, and Lightning's optimizers are told. A list of the parameters to regularise or to clip would
go on holding the old ones, which no longer train, and nothing would fail: so builtin containers and objects of other people's
classes follow. What a closure holds is out of reach.
"""

from __future__ import annotations

from collections import OrderedDict, defaultdict, deque
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from types import ModuleType
from typing import Any

from lightning import LightningModule, Trainer
from torch import Tensor, nn
from torch.optim import Optimizer

from actprune.surgery import with_wrapped

_OWN = frozenset(vars(LightningModule()))  # what Lightning and torch keep in every module
_DICTS, _LISTS = (dict, OrderedDict, defaultdict), (list, deque)
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
def followed(trainer: Trainer, task: LightningModule) -> Iterator[None]:
    """After the block, containers hold the parameters and buffers that took the place of others inside it.

    Looked through are the attributes of every module and callback, and lists, tuples, sets, dicts and plain objects in them.
    """
    before = _named(task)
    yield
    after = _named(task)
    new = {id(old): after[name] for name, old in before.items() if name in after and after[name] is not old}
    seen: set[int] = set()
    for owner in (*task.modules(), *trainer.callbacks):  # type: ignore[attr-defined]
        _renew(owner, new, seen)


def _named(task: nn.Module) -> dict[str, Tensor]:
    parameters = dict(task.named_parameters(remove_duplicate=False))
    return {**parameters, **dict(task.named_buffers(remove_duplicate=False))}


def _attributes(owner: Any) -> dict[str, Any]:
    return {name: value for name, value in vars(owner).items() if name not in _OWN}


def _leaves(values: Iterable[Any], depth: int = DEEPEST) -> Iterator[Any]:
    for value in values:
        if type(value) in (*_DICTS, *_LISTS, tuple):
            if depth:
                yield from _leaves(value.values() if isinstance(value, dict) else value, depth - 1)
        else:
            yield value


def _renew(owner: Any, new: Mapping[int, Tensor], seen: set[int], depth: int = DEEPEST) -> None:
    for name, value in _attributes(owner).items():
        renewed = _renewed(value, new, seen, depth)
        if renewed is not value:
            object.__setattr__(owner, name, renewed)


def _is_plain(value: Any) -> bool:
    """Whether it is an object of a class that somebody wrote for a training, not one of a package that looks after its own."""
    known = type(value).__module__.partition(".")[0] in _PACKAGES
    return not known and hasattr(value, "__dict__") and not isinstance(value, (type, ModuleType, nn.Module, Optimizer))


def _renewed(value: Any, new: Mapping[int, Tensor], seen: set[int], depth: int) -> Any:
    """The value itself, changed in place where it can be; what takes its place where it cannot."""
    if isinstance(value, Tensor):
        return new.get(id(value), value)
    kind, plain = type(value), _is_plain(value)
    if not depth or id(value) in seen or not (plain or kind in (*_DICTS, *_LISTS, tuple, set)):
        return value
    seen.add(id(value))
    renewed = partial(_renewed, new=new, seen=seen, depth=depth - 1)
    if plain:
        _renew(value, new, seen, depth - 1)
    elif kind is tuple:
        items = tuple(renewed(item) for item in value)
        return items if any(a is not b for a, b in zip(items, value, strict=True)) else value
    elif kind in _LISTS:
        for place, item in enumerate(value):
            value[place] = renewed(item)
    else:
        content = list(value.items()) if kind in _DICTS else [(item, None) for item in value]
        fresh = [(renewed(key), renewed(item)) for key, item in content]
        if any(a is not c or b is not d for (a, b), (c, d) in zip(content, fresh, strict=True)):
            value.clear()
            value.update(fresh if kind in _DICTS else [key for key, _ in fresh])
    return value
