"""What an analysis is a function of, in plain numbers, strings and digests, the same in every process.

Known by value: plain values, containers, tensors and arrays (a hash of their content), functions (code, constants, names,
defaults, closures, and global variables that are plain, tensors or arrays), methods, ``functools.partial``, and the attributes
of criteria, compensations, judges, modules, dataclasses and objects of the user's own classes, with what judges and criteria do
when they are asked. All else is known by its type, and functions and classes that a function calls, by their names.
"""

from __future__ import annotations

import dataclasses
import enum
import functools
import hashlib
import types
from collections.abc import Callable, Mapping
from pathlib import PurePath
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from actprune.compensation import Compensation
from actprune.core.calling import Example
from actprune.core.contents import is_own
from actprune.core.views import Criterion

_PLAIN = (bool, int, float, complex, str, bytes, type(None))
_PRINTED = (*_PLAIN, enum.Enum, np.generic, torch.dtype, torch.device, range, PurePath)
_READ = (*_PRINTED, Tensor, np.ndarray)
"""Global variables that functions are known by."""
_CODE = ("__call__", "forward", "statistics", "score")
"""Methods by which objects are known, too: what a judge does when it is called, and a criterion when it is asked."""
_OF_MODULES = frozenset(vars(nn.Module()))
"""Attributes that every module has, whether it is in training mode among them."""


def fingerprint(
    model: nn.Module,
    example_inputs: Example,
    criteria: Mapping[str, Criterion],
    settings: Any,
    data: Any,
    judge: Callable[..., Any],
    compensation: Any,
) -> dict[str, Any]:
    """What an analysis is made from: a string or a mapping for each thing that may be another one next time.

    Args:
        model: its tensors, the classes of its modules, what they print of themselves and their plain attributes count.
        example_inputs: shapes and dtypes count.
        criteria: name -> criterion.
        settings: an object of plain values and sequences of them.
        data: batches, of which every tensor counts.
        judge: loss and rightness of every sample.
        compensation: None, or an object.
    """
    return {
        "criteria": {name: spelled(criterion) for name, criterion in criteria.items()},
        "compensation": spelled(compensation),
        "judge": _hash(spelled(judge)),
        "modules": _hash(repr(_modules(model))),
        "settings": {key: list(value) if isinstance(value, tuple) else value for key, value in vars(settings).items()},
        "weights": _hash("".join(map(spelled, _tensors(model)))),
        "data": _hash("".join(map(spelled, tree_leaves(data)))),
        "example inputs": [_form(leaf) for leaf in tree_leaves(example_inputs)],
    }


def spelled(made: Any) -> str:
    """A value, and all that it holds, in one string; an object is one of whose attributes all count."""
    return _Speller().spell(made, is_whole=True)


class _Speller:
    """Spells values; what was spelled before is referred to, so that nothing is spelled twice or without end."""

    def __init__(self) -> None:
        self._known: dict[int, tuple[int, Any]] = {}

    def spell(self, value: Any, is_whole: bool = False) -> str:
        if isinstance(value, _PRINTED) or _is_plain(value):
            return repr(value)
        if id(value) in self._known:
            return f"<{self._known[id(value)][0]}>"
        self._known[id(value)] = (len(self._known), value)  # kept, so that nothing else gets its address
        if isinstance(value, Tensor) or isinstance(value, np.ndarray) and not value.dtype.hasobject:
            return _content(value)
        if isinstance(value, (list, tuple, np.ndarray)):
            return f"{type(value).__name__}({', '.join(map(self.spell, value))})"
        if isinstance(value, (set, frozenset)):
            return f"{{{', '.join(sorted(map(self.spell, value)))}}}"
        if isinstance(value, dict):
            return f"{{{', '.join(f'{self.spell(key)}: {self.spell(held)}' for key, held in value.items())}}}"
        return self._object(value, is_whole)

    def _object(self, value: Any, is_whole: bool) -> str:
        if isinstance(value, (type, types.ModuleType, types.BuiltinFunctionType)):
            return _name(value)
        if isinstance(value, types.FunctionType):
            return f"{_name(value)} {self.spell(self._function(value))}"
        if isinstance(value, types.CodeType):
            return self.spell([value.co_code, value.co_names, value.co_consts])
        if isinstance(value, types.MethodType):
            return self.spell([value.__func__, value.__self__])
        if isinstance(value, functools.partial):
            return f"partial {self.spell([value.func, value.args, value.keywords])}"
        kind = type(value)
        if isinstance(value, nn.Module):
            held: Any = [_modules(value), _tensors(value)]
        elif dataclasses.is_dataclass(value):
            held = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
        elif is_whole or isinstance(value, (Criterion, Compensation)) or is_own(kind):  # type: ignore[arg-type]
            held = getattr(value, "__dict__", {})
        else:
            return _name(kind)
        code = [f for f in (getattr(kind, name, None) for name in _CODE) if isinstance(f, types.FunctionType)]
        return f"{_name(kind)}({self.spell(held)}{f', {self.spell(code)}' if code else ''})"

    def _function(self, function: types.FunctionType) -> list[Any]:
        code, known = function.__code__, function.__globals__
        cells = [_of_cell(cell) for cell in function.__closure__ or ()]
        read = {name: known[name] for name in _names(code) if name in known and isinstance(known[name], _READ)}
        return [code, function.__defaults__, function.__kwdefaults__, cells, read, vars(function)]


def _names(code: types.CodeType) -> dict[str, None]:
    """What a function reads by name, and functions and comprehensions inside it do."""
    inside = [const for const in code.co_consts if isinstance(const, types.CodeType)]
    return dict.fromkeys([*code.co_names, *(name for const in inside for name in _names(const))])


def _of_cell(cell: types.CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # nothing was assigned yet
        return None


def _modules(model: nn.Module) -> list[tuple[Any, ...]]:
    """Name, class, what it prints of itself and plain attributes of every module."""
    return [(name, _name(type(module)), module.extra_repr(), _plain(module)) for name, module in model.named_modules()]


def _plain(module: nn.Module) -> dict[str, Any]:
    return {name: value for name, value in vars(module).items() if name not in _OF_MODULES and _is_plain(value)}


def _tensors(model: nn.Module) -> list[Any]:
    """Its state, and the buffers, of which some are not in it."""
    return [*model.state_dict().values(), *model.buffers()]


def _is_plain(value: Any) -> bool:
    return all(map(_is_plain, value)) if isinstance(value, tuple) else isinstance(value, _PLAIN)


def _form(leaf: Any) -> str:
    return f"{tuple(leaf.shape)} of {leaf.dtype}" if isinstance(leaf, Tensor) else spelled(leaf)


def _content(value: Tensor | np.ndarray) -> str:
    """Shape, dtype and a hash of what is in it."""
    array = value
    if isinstance(value, Tensor):
        dense = value.detach().cpu() if value.layout is torch.strided else value.detach().cpu().to_dense()
        array = dense.contiguous().flatten().view(torch.uint8).numpy()
    return f"{tuple(value.shape)} of {value.dtype}: {hashlib.sha256(array.tobytes()).hexdigest()}"  # type: ignore[union-attr]


def _name(thing: Any) -> str:
    return f"{getattr(thing, '__module__', '')}.{getattr(thing, '__qualname__', type(thing).__qualname__)}"


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
