"""Settings that a module keeps as an object, ``self.config.n_head``: its own numbers, in a place that others may share.

A layer that pickles as what it was made from, and as nothing else, keeps them in a dictionary: einops layers, of which the
lengths in a pattern are found again, ready to use, in other attributes.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any, cast

from torch import Tensor, nn

_WORDS = ("config", "cfg", "args", "hparams", "params", "options", "settings", "namespace")


def held(module: nn.Module) -> Iterator[tuple[str, Any]]:
    """(name, object or dictionary) of the plain attributes of a module that are settings, by their name or class."""
    remade = _remade(module)
    for name, value in vars(module).items():
        if remade and type(value) is dict and not name.startswith("_"):
            yield name, value
        if hasattr(value, "__dict__") and not isinstance(value, (nn.Module, Tensor, type)) and not callable(value):
            words = f"{name} {type(value).__name__}".lower()
            if any(word in words for word in _WORDS):
                yield name, value


def numbers(module: nn.Module) -> list[tuple[str, int]]:
    """(``object.name``, value) of the integers in a module's settings."""
    return [
        (f"{name}.{key}", number)
        for name, value in held(module)
        for key, number in (value if isinstance(value, dict) else vars(value)).items()
        if type(number) is int and isinstance(key, str) and not key.startswith("_")
    ]


def changed(value: Any, key: str, number: Any) -> Any:
    """A copy of settings with another number, for one module alone."""
    if isinstance(value, dict):
        return value | {key: number}
    other = copy.copy(value)
    object.__setattr__(other, key, number)  # a frozen dataclass refuses its own way
    return other


def following(module: nn.Module, name: str, value: Any) -> dict[str, Any]:
    """Attributes of a module, and what they are where these are its settings of that name."""
    if not isinstance(value, dict):
        return {name: value}
    fresh: Any = type(module).__new__(type(module))
    fresh.__setstate__(cast(Any, module).__getstate__() | {name: value})
    own = vars(nn.Module())
    return {attribute: made for attribute, made in vars(fresh).items() if attribute not in own}


def _remade(module: nn.Module) -> bool:
    """Whether a module without tensors says itself what it is pickled as and made from."""
    kinds = [vars(kind) for kind in type(module).__mro__ if kind is not object and not kind.__module__.startswith("torch.")]
    says = all(any(name in kind for kind in kinds) for name in ("__getstate__", "__setstate__"))
    return says and not (module._parameters or module._buffers or module._modules)
