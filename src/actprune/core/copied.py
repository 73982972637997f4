"""Parts of a model that copy other parts of it, averages for one: they take the same cuts, and are not counted.

A copy has the modules and names of its original, so that a plan for the original says all that there is to say of the copy.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterator, Mapping
from typing import Any, TypeAlias, TypeVar

from torch import Tensor, nn

from actprune.core.errors import ConfigError
from actprune.core.plan import Plan
from actprune.core.record import SurgeryRecord

Copies: TypeAlias = Mapping[str, str]
"""Dotted name of a copy -> dotted name of what it is a copy of."""
NONE: Copies = {}
Value = TypeVar("Value")


def lies_in(name: str, path: str) -> bool:
    """Whether a dotted name is that of a module, or of something inside it."""
    return not path or name == path or name.startswith(f"{path}.")


def original(name: str, copies: Copies) -> str:
    """The name of what something in a copy is a copy of; anything else has its own."""
    copy = next((path for path in copies if lies_in(name, path)), None)
    return name if copy is None else copies[copy] + name[len(copy) :]


def is_copied(name: str, copies: Copies) -> bool:
    """Whether a dotted name lies in a copy."""
    return any(lies_in(name, path) for path in copies)


def tensors_in(model: nn.Module, copies: Copies) -> Iterator[tuple[str, Tensor, str, Tensor]]:
    """(name, tensor, name of its original, original) of everything of the same shape that the copies hold."""
    for path in copies:
        for inner, module in model.get_submodule(path).named_modules():
            owner = f"{path}.{inner}".rstrip(".")
            source = _submodule(model, original(owner, copies))
            theirs = {} if source is None or source is module else _held(source)
            for leaf, tensor in _held(module).items():
                other = theirs.get(leaf)
                if other is not None and other is not tensor and other.shape == tensor.shape:
                    yield f"{owner}.{leaf}", tensor, f"{original(owner, copies)}.{leaf}", other


def named_alike(names: Mapping[int, str], model: nn.Module, copies: Copies) -> dict[int, str]:
    """``id(tensor)`` -> name of the original, of what the copies hold and of the originals; ``names`` knows tied ones."""
    found: dict[int, str] = {}
    for _, tensor, name, other in tensors_in(model, copies):
        found[id(tensor)] = found[id(other)] = original(names.get(id(other), name), copies)
    return found


def mirrored(plan: Plan, model: nn.Module, copies: Copies) -> Plan:
    """A plan that cuts the copies as well: what it says of an original holds for every copy.

    Args:
        plan: made for the model as it is.
        model: holds originals and copies.
        copies: which are which.
    """
    if not copies:
        return plan
    return dataclasses.replace(
        plan,
        removed=_of_tensors(plan.removed, model, copies),
        shifts=_of_tensors(plan.shifts, model, copies),
        attributes=_of_modules(plan.attributes, model, copies),
        new_biases=_of_modules(plan.new_biases, model, copies),
    )


def mirrored_record(record: SurgeryRecord, model: nn.Module, copies: Copies) -> SurgeryRecord:
    """The same of a record: those of earlier versions did not name the copies inside of a network."""
    if not copies or not record:
        return record
    return dataclasses.replace(
        record,
        removed=_of_tensors(record.removed, model, copies),
        shapes=_of_tensors(record.shapes, model, copies),
        attributes=_of_modules(record.attributes, model, copies),
        biases=list(_of_modules(dict.fromkeys(record.biases), model, copies)),
    )


def led_by(ran: Collection[str], copies: Copies) -> Copies:
    """The same copies, but where of an original only a copy runs, that one takes its place.

    Args:
        ran: names of modules that run.
        copies: which are which; no original lies in a copy.
    """
    leads: dict[str, str] = {}
    for path, source in copies.items():
        if any(lies_in(name, path) for name in ran) and not any(lies_in(name, source) for name in ran):
            leads.setdefault(source, path)
    others = {path: leads.get(source, source) for path, source in copies.items() if leads.get(source) != path}
    return {**others, **leads}


def resolved(copies: Copies) -> Copies:
    """The same copies, those of a copy as copies of its original.

    Raises:
        ConfigError: they are copies of one another.
    """
    found = dict(copies)
    for path in found:
        for _ in found:
            found[path] = original(found[path], copies)
        if is_copied(found[path], copies):
            raise ConfigError(f"copies={dict(copies)} names {path!r} as a copy of itself; name what is trained as the original")
    return found


def checked(model: nn.Module, copies: Copies) -> Copies:
    """Copies as a user named them, resolved.

    Raises:
        ConfigError: names what the model does not have.
    """
    for path in (path for pair in copies.items() for path in pair):
        if not path or _submodule(model, path) is None:
            raise ConfigError(
                f"copies names {path!r}, which is no part of {type(model).__name__}; take names of named_modules()"
            )
    return resolved(copies)


def _of_tensors(named: Mapping[str, Value], model: nn.Module, copies: Copies) -> dict[str, Value]:
    # a tied tensor is known by another of its names
    known = {id(tensor): name for name in named if (tensor := _tensor(model, name)) is not None}
    found, done = dict(named), {id_ for id_, name in known.items() if not is_copied(name, copies)}
    for name, tensor, source, other in tensors_in(model, copies):
        of = source if source in named else known.get(id(other))
        if of is not None and id(tensor) not in done:
            found[known.get(id(tensor), name)] = named[of]
            done.add(id(tensor))
    return found


def _of_modules(named: Mapping[str, Value], model: nn.Module, copies: Copies) -> dict[str, Value]:
    found = dict(named)
    for path, source in copies.items():
        for name, value in named.items():
            if lies_in(name, source):
                mine = path + name[len(source) :]
                module = _submodule(model, mine)
                if module is not None and module is not _submodule(model, name):
                    found[mine] = value
    return found


def _held(module: nn.Module) -> dict[str, Tensor]:
    values: dict[str, Any] = {**vars(module), **module._buffers, **module._parameters}
    return {name: value for name, value in values.items() if isinstance(value, Tensor)}


def _submodule(model: nn.Module, path: str) -> nn.Module | None:
    try:
        return model.get_submodule(path)
    except AttributeError:
        return None


def _tensor(model: nn.Module, name: str) -> Tensor | None:
    path, _, leaf = name.rpartition(".")
    module = _submodule(model, path)
    return None if module is None else _held(module).get(leaf)
