"""Which factor of a dimension that a view splits stays cuttable, and what runs of a model find out about that choice."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeAlias, TypeVar

from actprune.graph.ids import Ids

Factor: TypeAlias = tuple[tuple[str, int, int], tuple[int, ...], int]
"""A factor of a dimension that is split: (module, call, operator), extents of all factors, which of them."""


@dataclass(kw_only=True)
class Splits:
    """What a run was told of its splits, and what it found."""

    outer: frozenset[str] = frozenset()
    """Modules in which a split keeps its last factor but one cuttable, where nothing names the head count."""
    guessed: set[str] = field(default_factory=set)
    """Modules with a split whose cuttable factor was not named by any attribute."""
    guesses: list[Ids] = field(default_factory=list)
    """What such splits left cuttable."""
    apart: frozenset[Factor] = frozenset()
    """Factors of splits whose positions are picked one by one: another factor is the one to stay cuttable."""
    picked: set[Factor] = field(default_factory=set)
    """The same, as this run finds them."""
    chosen: dict[int, tuple[Ids, Factor]] = field(default_factory=dict)
    """``id(ids)`` -> (ids, factor) of what splits left cuttable by choice."""
    scored: set[str] = field(default_factory=set)
    """Modules in which a cuttable dimension is summed over between two activations, or a guessed one has its extreme taken."""

    def pick(self, ids: Ids) -> None:
        """Positions of a dimension are picked one by one: if a split chose it, it chose the wrong factor."""
        if id(ids) in self.chosen:
            self.picked.add(self.chosen[id(ids)][1])


State = TypeVar("State", bound=Splits)


def settled(run: Callable[[frozenset[str], frozenset[Factor]], State]) -> State:
    """Run a model, told what its earlier runs found (``outer``, ``apart``), until a run finds nothing new.

    Where a dimension was split for attention and no attribute names the heads, a second run takes the outer factor for them.
    Where the factor that stayed cuttable is picked apart, queries from keys for one, the next run takes another.
    """
    state = run(frozenset(), frozenset())
    if outer := frozenset(state.guessed & state.scored):
        state = run(outer, frozenset())
    while not state.picked <= state.apart:
        state = run(outer, state.apart | state.picked)
    return state
