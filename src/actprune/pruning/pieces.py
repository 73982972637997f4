"""Pieces of a long job that survive its end: one file each, whole or absent, tied to what they were made from."""

from __future__ import annotations

import hashlib
import json
import os
import re
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from actprune.core.errors import ConfigError
from actprune.core.files import atomic_path

_SETTINGS = "made_from.json"


class Pieces:
    """Results by name, kept in a folder.

    Args:
        folder: where; None keeps nothing.
        made_from: what the results are a function of, plain numbers and strings.

    Raises:
        ConfigError: the folder holds pieces that were made from something else.
    """

    def __init__(self, folder: str | os.PathLike[str] | None, made_from: Mapping[str, Any]) -> None:
        self._folder = None if folder is None else Path(folder)
        self.seconds_before = 0.0
        """Wall time that earlier runs took for the pieces that were taken from the folder."""
        if self._folder is None:
            return
        file, wanted = self._folder / _SETTINGS, json.loads(json.dumps(made_from))
        if file.is_file():
            before = json.loads(file.read_text(encoding="utf-8"))
            differing = [key for key in {**before, **wanted} if before.get(key) != wanted.get(key)]
            if differing:
                raise ConfigError(
                    f"{self._folder} holds an analysis that was made from other {', '.join(differing)}; "
                    "choose another folder, or delete this one"
                )
        _write(file, wanted)

    def get(self, name: str, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """The piece of this name: as it was kept, else made now and kept."""
        if self._folder is None:
            return make()
        file = self._folder / f"{name}.json"
        if file.is_file():
            kept = json.loads(file.read_text(encoding="utf-8"))
            self.seconds_before += kept["seconds"]
            return kept["result"]
        began = time.monotonic()
        _write(file, {"result": make(), "seconds": time.monotonic() - began})
        return json.loads(file.read_text(encoding="utf-8"))["result"]


def fingerprint(
    model: nn.Module, criteria: Mapping[str, Any], settings: Any, data: Any, judge: Callable[..., Any], compensation: Any
) -> dict[str, Any]:
    """What an analysis is a function of, with digests in place of tensors; a judge is known by its name and its code."""
    return {
        "criteria": {name: _spell(criterion) for name, criterion in criteria.items()},
        "compensation": _spell(compensation),
        "judge": _digest([_name(judge), *_code(judge)]),
        "modules": _digest([f"{name}: {module.extra_repr()} {_name(type(module))}" for name, module in model.named_modules()]),
        "settings": {key: list(value) if isinstance(value, tuple) else value for key, value in vars(settings).items()},
        "weights": _digest(list(model.state_dict().values())),
        "data": _digest(tree_leaves(data)),
    }


def _spell(made: Any) -> str:
    spelled = f"{_name(type(made))}({getattr(made, '__dict__', '')})"
    return re.sub(" at 0x[0-9a-f]+", "", spelled)  # an address is another next time


def _code(function: Callable[..., Any]) -> list[Any]:
    code = getattr(function, "__code__", None)
    plain = (bool, int, float, str, type(None))
    return [] if code is None else [code.co_code, code.co_names, [x for x in code.co_consts if isinstance(x, plain)]]


def _name(thing: Any) -> str:
    return f"{getattr(thing, '__module__', '')}.{getattr(thing, '__qualname__', type(thing).__qualname__)}"


def _digest(leaves: list[Any]) -> str:
    digest = hashlib.sha256()
    for leaf in leaves:
        if isinstance(leaf, Tensor):
            digest.update(str((tuple(leaf.shape), leaf.dtype)).encode())
            digest.update(leaf.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
        else:
            digest.update(repr(leaf).encode())
    return digest.hexdigest()


def _write(file: Path, content: Any) -> None:
    with atomic_path(file) as temporary:
        temporary.write_text(json.dumps(content) + "\n", encoding="utf-8")
