"""Groups that stay as they are, because the user named modules that produce them."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase

from torch import nn

from actprune.core.errors import ConfigError
from actprune.graph import Graph
from actprune.pruning.select import Selection


def ignored(model: nn.Module, graph: Graph, patterns: Sequence[str]) -> dict[str, str]:
    """Group name -> why it stays, of every group to which an output of a named module belongs, of one inside it, too.

    What such a module only reads may become narrower: the group belongs to what writes it.

    Args:
        model: whose modules are named.
        graph: its groups.
        patterns: names of modules, ``*`` for any part of one (``fnmatch``).

    Raises:
        ConfigError: a name matches no module.
    """
    chosen: dict[str, str] = {}
    for pattern in patterns:
        found = _matching(model, pattern)
        if not found:
            names = _names(model)
            near = difflib.get_close_matches(pattern, names, n=3) or names[:5]
            raise ConfigError(
                f"selection ignore={pattern!r} matches no module of {type(model).__name__}; there are {', '.join(near)}, ...; "
                "take names of named_modules(), or patterns such as 'layer4.*'"
            )
        chosen |= {name: chosen.get(name, pattern) for name in found}
    read = {(consumer.weight, consumer.reads_dim) for consumer in graph.consumers}
    reasons: dict[str, str] = {}
    for group in graph.groups if chosen else ():
        owners = (tensor.rpartition(".")[0] for tensor, dim in group.members if (tensor, dim) not in read)
        by = next((owner for owner in owners if owner in chosen), None)
        if by is not None:
            reasons[group.name] = f"{by} is ignored, as ignore={chosen[by]!r} says"
    return reasons


def for_each(selection: Selection, models: Sequence[nn.Module]) -> list[Selection]:
    """The selection of every one of several models: each ignores what it has, and what none has, so that it is refused."""
    has = [[pattern for pattern in selection.ignore if _matching(model, pattern)] for model in models]
    nowhere = [pattern for pattern in selection.ignore if not any(pattern in one for one in has)]
    return [dataclasses.replace(selection, ignore=[*one, *nowhere]) for one in has]


def _names(model: nn.Module) -> list[str]:
    return [name for name, _ in model.named_modules(remove_duplicate=False) if name]


def _matching(model: nn.Module, pattern: str) -> list[str]:
    """Names of the modules that a pattern means: those it matches, and what is inside of them."""
    return [name for name in _names(model) if any(fnmatchcase(outer, pattern) for outer in _around(name))]


def _around(name: str) -> Iterator[str]:
    """A module's name, and those of the modules it lies in."""
    while name:
        yield name
        name = name.rpartition(".")[0]
