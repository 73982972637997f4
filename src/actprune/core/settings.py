"""Settings that a module keeps as an object, ``self.config.n_head``: its own numbers, in a place that others may share."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

_WORDS = ("config", "cfg", "args", "hparams", "params", "options", "settings", "namespace")


def held(module: nn.Module) -> Iterator[tuple[str, Any]]:
    """(name, object) of the plain attributes of a module that are called settings, or are of a class that is."""
    for name, value in vars(module).items():
        if hasattr(value, "__dict__") and not isinstance(value, (nn.Module, Tensor, type)) and not callable(value):
            words = f"{name} {type(value).__name__}".lower()
            if any(word in words for word in _WORDS):
                yield name, value


def numbers(module: nn.Module) -> list[tuple[str, int]]:
    """(``object.name``, value) of the integers in a module's settings."""
    return [
        (f"{name}.{key}", number)
        for name, value in held(module)
        for key, number in vars(value).items()
        if type(number) is int and not key.startswith("_")
    ]


def changed(value: Any, key: str, number: Any) -> Any:
    """A copy of settings with another number, for one module alone."""
    other = copy.copy(value)
    object.__setattr__(other, key, number)  # a frozen dataclass refuses its own way
    return other
