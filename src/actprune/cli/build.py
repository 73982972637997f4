"""From a configuration node to an object, with every mistake in it told before anything is built.

Each ``_target_`` is looked up and its arguments are compared with its signature: unknown names and values of the
wrong type raise one error that names the key, the value and what would be right.
"""

from __future__ import annotations

import difflib
import inspect
import re
import types
import typing
from collections.abc import Iterator, Sequence
from dataclasses import fields
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from hydra.errors import InstantiationException
from hydra.utils import get_object, instantiate
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from torch import Tensor

from actprune.core.budget import Budget
from actprune.core.errors import ActPruneError, ConfigError

_PLAIN = (int, float, bool, str, type(None))
_HYDRA_KEYS = {"_target_", "_partial_", "_args_", "_convert_", "_recursive_"}


def resolved(config: DictConfig) -> DictConfig:
    """A copy with every interpolation replaced by its value.

    Raises:
        ConfigError: a mandatory value is missing, or an interpolation points nowhere.
    """
    copy = config.copy()
    try:
        OmegaConf.resolve(copy)
    except OmegaConfBaseException as error:
        raise ConfigError(f"the configuration cannot be resolved: {str(error).strip()}") from error
    missing = sorted(OmegaConf.missing_keys(copy), key=len)  # the shortest is the key itself, not what refers to it
    if missing:
        raise ConfigError(f"{missing[0]} has no value; set it on the command line: {missing[0]}=...")
    return copy


def build(node: Any, key: str, **arguments: Any) -> Any:
    """Instantiate a node of a resolved configuration.

    Args:
        node: the node, with a ``_target_``.
        key: its place in the configuration, for messages.
        arguments: passed to the target beside what the node says.

    Raises:
        ConfigError: the node does not fit its target's signature, or the target refuses it.
        ActPruneError: whatever the target raises of these.
    """
    check(node, key)
    try:
        return instantiate(node, _convert_="all", **arguments)
    except InstantiationException as error:
        cause = error.__cause__ or error
        inner = re.findall(r"full_key: (\S+)", str(error))  # the node inside this one that failed
        key = inner[0] if inner else key
        if isinstance(cause, ActPruneError):
            raise type(cause)(f"{key}: {cause}") from cause
        raise ConfigError(f"{key} ({node._target_}): {type(cause).__name__}: {cause}") from cause


def check(node: Any, key: str) -> None:
    """Compare every target inside ``node`` with the signature of what it names.

    Raises:
        ConfigError: a target does not exist, has no such argument, or an argument has the wrong type.
    """
    for place, target in _targets(node, key):
        _check_target(target, place)


def check_budget(node: Any) -> None:
    """Refuse a budget that does not say of what it is, and shares of what nothing counts.

    Raises:
        ConfigError: names what there is.
    """
    known = [share.name for share in fields(Budget)]
    if not isinstance(node, DictConfig):
        raise ConfigError(f"budget={node} must say of what: {' or '.join(f'budget.{name}={node}' for name in known)}")
    for name in map(str, node):
        if name not in known:
            raise ConfigError(f"budget.{name}={node[name]}: nothing counts {name}; it takes {', '.join(known)}")


def _targets(node: Any, key: str) -> Iterator[tuple[str, DictConfig]]:
    if isinstance(node, DictConfig):
        if "_target_" in node:
            yield key, node
        children: Iterator[Any] = iter(node.items())
    elif isinstance(node, ListConfig):
        children = enumerate(node)
    else:
        return
    for name, child in children:
        yield from _targets(child, f"{key}.{name}")


def _check_target(node: DictConfig, key: str) -> None:
    try:
        target = get_object(node._target_)
    except Exception as error:
        raise ConfigError(f"{key}._target_={node._target_} cannot be imported: {error}") from error
    known, hints, takes_any = _signature(target)
    for name, value in ((str(name), value) for name, value in node.items()):
        if name in _HYDRA_KEYS:
            continue
        if name not in known and not takes_any:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {near[0]}?" if near else f"it takes {', '.join(known) or 'nothing'}"
            raise ConfigError(f"{key}.{name}: {node._target_} has no such argument; {hint}")
        if isinstance(value, (DictConfig, ListConfig)) or name not in hints:
            continue
        if value is not None and _is_list(hints[name]):
            raise ConfigError(f"{key}.{name}={value!r} must be a list, e.g. {key}.{name}=[{value}]")
        accepted = _accepted(hints[name])
        if accepted and not any(_fits(value, kind) for kind in accepted):
            raise ConfigError(f"{key}.{name}={value!r} must be {' or '.join(map(_spell, accepted))}")


def _signature(target: Any) -> tuple[list[str], dict[str, Any], bool]:
    """Names and types of a target's arguments, and whether it takes others too; ``**kwargs`` lead on to its bases."""
    functions = [target]
    if inspect.isclass(target):
        functions = [vars(base)["__init__"] for base in target.__mro__ if "__init__" in vars(base) and base is not object]
    known: list[str] = []
    hints: dict[str, Any] = {}
    for function in functions:
        try:
            parameters = list(inspect.signature(function).parameters.values())
        except (TypeError, ValueError):  # builtins without a signature
            return known, hints, True
        names = [p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY) and p.name != "self"]
        known += [name for name in names if name not in known]
        hints = {**_hints(function), **hints}
        if not any(p.kind is p.VAR_KEYWORD for p in parameters):
            return known, hints, False
    return known, hints, True


def _hints(function: Any) -> dict[str, Any]:
    try:
        return get_type_hints(inspect.unwrap(function))
    except Exception:  # annotations that exist only for type checkers
        return {}


def _accepted(hint: Any) -> list[Any] | None:
    """The plain types and literal values of an annotation; None if it allows anything else."""
    origin = get_origin(hint)
    if origin is typing.Annotated:
        return _accepted(get_args(hint)[0])
    if origin in (Union, types.UnionType):
        parts = [_accepted(part) for part in get_args(hint)]
        return None if any(part is None for part in parts) else [kind for part in parts for kind in part or ()]
    if origin is Literal:
        return list(get_args(hint))
    if hint is Tensor:
        return []  # which no setting is
    return [hint] if hint in _PLAIN else None


def _is_list(hint: Any) -> bool:
    """Whether an annotation takes lists, and nothing plain but None."""
    parts = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    kinds = [get_origin(part) or part for part in parts if part is not type(None)]
    return bool(kinds) and all(kind in (Sequence, list, tuple) for kind in kinds)


def _fits(value: Any, kind: Any) -> bool:
    if not isinstance(kind, type):
        return value == kind
    if kind is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    return isinstance(value, kind) and (kind is bool or not isinstance(value, bool))


def _spell(kind: Any) -> str:
    if kind is type(None):
        return "null"
    return kind.__name__ if isinstance(kind, type) else repr(kind)
