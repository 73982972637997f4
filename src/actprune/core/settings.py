"""Settings that a module keeps as an object or dictionary, ``self.config.n_head``: its own numbers, which others may share.

Layers of einops keep the lengths in a pattern as a dictionary, and once more as a tuple of its items, which they run with.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

_WORDS = ("config", "cfg", "args", "hparams", "params", "options", "settings", "namespace")


def held(module: nn.Module) -> Iterator[tuple[str, Any]]:
    """(name, value) of the plain attributes of a module that are settings: called so, of a class called so, or spelt out."""
    own = vars(module)
    for name, value in own.items():
        if type(value) is dict:
            found = not name.startswith("_") and (_speaks(name) or any(_spells(other, value) for other in own.values()))
        else:
            plain = hasattr(value, "__dict__") and not isinstance(value, (nn.Module, Tensor, type)) and not callable(value)
            found = plain and _speaks(f"{name} {type(value).__name__}")
        if found:
            yield name, value


def numbers(module: nn.Module) -> list[tuple[str, int]]:
    """(``object.name``, value) of the integers in a module's settings."""
    return [
        (f"{name}.{key}", number)
        for name, value in held(module)
        for key, number in (value if type(value) is dict else vars(value)).items()
        if type(number) is int and isinstance(key, str) and not key.startswith("_")
    ]


def changed(value: Any, key: str, number: Any) -> Any:
    """A copy of settings with another number, for one module alone."""
    if type(value) is dict:
        return value | {key: number}
    other = copy.copy(value)
    object.__setattr__(other, key, number)  # a frozen dataclass refuses its own way
    return other


def following(module: nn.Module, name: str, value: Any) -> dict[str, Any]:
    """The attributes of a module that change where these are its settings of that name, and to what."""
    if type(value) is not dict:
        return {name: value}
    kept = getattr(module, name)
    spelt = {other: type(items) for other, items in vars(module).items() if _spells(items, kept)}
    return {name: value} | {other: kind(value.items()) for other, kind in spelt.items()}


def _speaks(name: str) -> bool:
    return any(word in name.lower() for word in _WORDS)


def _spells(items: Any, settings: dict[Any, Any]) -> bool:
    """Whether these are the items of a dictionary, one by one; of what is plain, for tensors and the like may not compare."""
    if type(items) not in (tuple, list) or not items or len(items) != len(settings):
        return False
    if not all(type(pair) is tuple and len(pair) == 2 for pair in items):
        return False
    flat = [x for pair in (*items, *settings.items()) for x in pair]
    return all(type(x) in (str, int, float, bool) for x in flat) and list(items) == list(settings.items())
