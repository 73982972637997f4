"""The table of rules: one small function per family of ATen operators, registered by decorator."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, TypeAlias

import torch

from actprune.core.operands import named_arguments
from actprune.graph.state import TraceState

Rule: TypeAlias = Callable[[TraceState, SimpleNamespace, Any], None]
"""``rule(trace, arguments by schema name, output)`` sets the output's ids and ties what must leave together."""

RULES: dict[str, Rule] = {}


def rule(*operators: str) -> Callable[[Rule], Rule]:
    """Register a rule for ATen operators by name, without the overload.

    Raises:
        ValueError: an operator has a rule already.
    """

    def register(function: Rule) -> Rule:
        for name in operators:
            if name in RULES:
                raise ValueError(f"operator aten::{name} has a rule already: {RULES[name].__name__}")
            RULES[name] = function
        return function

    return register


def bind(func: torch._ops.OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]) -> SimpleNamespace:
    """Name the arguments of a call by the operator's schema, defaults filled in (``self`` becomes ``input``)."""
    named = named_arguments(func, args, kwargs)
    return SimpleNamespace(**{"input" if name == "self" else name: value for name, value in named.items()})
