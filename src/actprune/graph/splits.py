"""Which factor of a dimension that a view splits stays cuttable, and what runs of a model find out about that choice."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
from numpy.typing import NDArray
from torch import nn

from actprune.graph.ids import Ids

if TYPE_CHECKING:
    from actprune.graph.state import TraceState

Factor: TypeAlias = tuple[tuple[str, int, int], tuple[int, ...], int]
"""A factor of a dimension that is split: (module, call, operator), extents of all factors, which of them."""


@dataclass(frozen=True)
class Hints:
    """What a run is told of its splits."""

    outer: frozenset[str] = frozenset()
    """Modules in which a split keeps its last factor but one cuttable, where nothing names the head count."""
    apart: frozenset[Factor] = frozenset()
    """Factors of splits whose positions are picked one by one: another factor is the one to stay cuttable."""
    stuck: frozenset[Factor] = frozenset()
    """Factors that cannot leave for what is done to them: the outermost of the others is the one to stay cuttable."""


@dataclass(kw_only=True)
class Splits:
    """What a run was told of its splits, and what it found."""

    hints: Hints = Hints()
    guessed: set[str] = field(default_factory=set)
    """Modules with a split whose cuttable factor was not named by any attribute."""
    guesses: list[tuple[NDArray[np.int64], int]] = field(default_factory=list)
    """What such splits left cuttable, and how many locks there were before."""
    picked: set[Factor] = field(default_factory=set)
    """Factors whose positions this run finds to be picked one by one."""
    chosen: dict[int, tuple[Ids, Factor]] = field(default_factory=dict)
    """``id(ids)`` -> (ids, factor) of what splits left cuttable by choice."""
    returned: range = range(0)
    """Numbers of the locks on what the model returns."""
    scored: set[str] = field(default_factory=set)
    """Modules in which a cuttable dimension is summed over between two activations, or a guessed one has its extreme taken."""

    def pick(self, ids: Ids) -> None:
        """Positions of a dimension are picked one by one: if a split chose it, it chose the wrong factor."""
        if id(ids) in self.chosen:
            self.picked.add(self.chosen[id(ids)][1])


def settled(run: Callable[[Hints], TraceState]) -> TraceState:
    """Run a model, told what its earlier runs found, until a run finds nothing new.

    Where a dimension was split for attention and no attribute names the heads, a second run takes the outer factor for them.
    Where the factor that stayed cuttable is picked apart, queries from keys for one, the next run takes another. Where it
    cannot leave, as columns of a map that a convolution reads, a further run takes the outermost; it counts if more can leave,
    in no larger pieces.
    """
    state = run(Hints())
    if outer := frozenset(state.guessed & state.scored):
        state = run(Hints(outer))
    state = best = _whole(run, state)
    while stuck := _stuck(state):
        state = _whole(run, run(replace(state.hints, stuck=state.hints.stuck | stuck)))
        (more, units), (positions, least) = _leaving(state), _leaving(best)
        if more <= positions or units < least:
            break
        best = state
    return best


def _whole(run: Callable[[Hints], TraceState], state: TraceState) -> TraceState:
    """Run on until nothing that was left cuttable is picked apart."""
    while not state.picked <= state.hints.apart:
        state = run(replace(state.hints, apart=state.hints.apart | state.picked))
    return state


def _stuck(state: TraceState) -> set[Factor]:
    """Factors that were guessed and cannot leave for what was done to them; the output would lock any other as well."""
    if not state.guesses:
        return set()
    locks, read, found = state.space.first_locks(), _read(state), set()
    learned = np.zeros(len(state.space), bool)
    learned[_learned(state)] = True
    for ids, before in state.guesses:
        roots, factor = state.space.find(ids[ids >= 0]), state.chosen[id(ids)][1]
        if factor in state.hints.stuck or not learned[roots].any() or ((locks[roots] < 0) & read[roots]).any():
            continue
        why = set(locks[roots].tolist())
        if min(why - {-1}, default=before) >= before and why.isdisjoint(state.returned):
            found.add(factor)
    return found


def _learned(state: TraceState) -> NDArray[np.int64]:
    """Roots of all positions of parameters, one after another."""
    columns = [ids for name, dims in state.tensor_ids.items() if isinstance(state.tensors[name], nn.Parameter) for ids in dims]
    return state.space.find(np.concatenate([np.empty(0, np.int64), *columns]))


def _read(state: TraceState) -> NDArray[np.bool_]:
    """Of every root, whether a contraction reads it."""
    read = np.zeros(len(state.space), bool)
    for contraction in state.contractions:
        if contraction.reads is not None:
            read[state.space.find(contraction.reads[contraction.reads >= 0])] = True
    return read


def _leaving(state: TraceState) -> tuple[int, int]:
    """How many positions of parameters may leave, and in how many units."""
    roots = _learned(state)
    roots = roots[(state.space.first_locks()[roots] < 0) & _read(state)[roots]]
    return len(roots), len(np.unique(roots))
