"""What else holds parameters of a network: optimizers that the module steps itself, lists that it or a callback made of them.

A cut gives a layer new parameters, and Lightning's optimizers are told. A list of the parameters to regularise or to clip would
go on holding the old ones, which no longer train, and nothing would fail: so builtin containers follow.
"""

from __future__ import annotations

from collections import OrderedDict, defaultdict, deque
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from lightning import LightningModule, Trainer
from torch import Tensor, nn
from torch.optim import Optimizer

from actprune.surgery import with_wrapped

_OWN = frozenset(vars(LightningModule()))  # what Lightning and torch keep in every module
_DICTS, _LISTS = (dict, OrderedDict, defaultdict), (list, deque)


def optimizers_of(trainer: Trainer, task: LightningModule) -> list[Optimizer]:
    """The trainer's optimizers, those that the LightningModule keeps for itself, and those that these wrap; each once."""
    ours = {id(parameter) for parameter in task.parameters()}
    kept = [value for value in _leaves(_attributes(task).values()) if isinstance(value, Optimizer)]
    theirs = [o for o in kept if any(id(p) in ours for group in o.param_groups for p in group["params"])]
    return with_wrapped([*trainer.optimizers, *theirs])


@contextmanager
def followed(trainer: Trainer, task: LightningModule) -> Iterator[None]:
    """After the block, containers hold the parameters and buffers that took the place of others inside it.

    Looked through are the attributes of every module and callback, and lists, tuples, sets and dicts in them.
    """
    before = _named(task)
    yield
    after = _named(task)
    new = {id(old): after[name] for name, old in before.items() if name in after and after[name] is not old}
    seen: set[int] = set()
    for owner in (*task.modules(), *trainer.callbacks):  # type: ignore[attr-defined]
        for name, value in _attributes(owner).items():
            renewed = _renewed(value, new, seen)
            if renewed is not value:
                object.__setattr__(owner, name, renewed)


def _named(task: nn.Module) -> dict[str, Tensor]:
    parameters = dict(task.named_parameters(remove_duplicate=False))
    return {**parameters, **dict(task.named_buffers(remove_duplicate=False))}


def _attributes(owner: Any) -> dict[str, Any]:
    return {name: value for name, value in vars(owner).items() if name not in _OWN}


def _leaves(values: Iterable[Any], depth: int = 3) -> Iterator[Any]:
    for value in values:
        if type(value) in (*_DICTS, *_LISTS, tuple):
            if depth:
                yield from _leaves(value.values() if isinstance(value, dict) else value, depth - 1)
        else:
            yield value


def _renewed(value: Any, new: Mapping[int, Tensor], seen: set[int]) -> Any:
    """The value itself, changed in place where it can be; what takes its place where it cannot."""
    if isinstance(value, Tensor):
        return new.get(id(value), value)
    kind = type(value)
    if kind not in (*_DICTS, *_LISTS, tuple, set) or id(value) in seen:
        return value
    seen.add(id(value))
    if kind is tuple:
        items = tuple(_renewed(item, new, seen) for item in value)
        return items if any(a is not b for a, b in zip(items, value, strict=True)) else value
    if kind in _LISTS:
        for place, item in enumerate(value):
            value[place] = _renewed(item, new, seen)
        return value
    content = list(value.items()) if kind in _DICTS else [(item, None) for item in value]
    fresh = [(_renewed(key, new, seen), _renewed(item, new, seen)) for key, item in content]
    if any(a is not c or b is not d for (a, b), (c, d) in zip(content, fresh, strict=True)):
        value.clear()
        value.update(fresh if kind in _DICTS else [key for key, _ in fresh])
    return value
