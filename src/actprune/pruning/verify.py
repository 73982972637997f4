"""Prove before any training that the groups can leave: rehearse a cut, repair what can be repaired, lock the rest.

Shares of all groups are cut, the model runs once, everything is put back. What still fails after the repairs is searched for
its culprits, and those are locked with the error as the reason.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

from torch import nn

from actprune.core.calling import Example, once_and_twice, undisturbed
from actprune.core.copied import NONE, Copies
from actprune.core.errors import TraceError
from actprune.core.stack import held_by
from actprune.graph import Follower, Graph, Group, Trace
from actprune.pruning.idle import candidates, idle, roles, without
from actprune.pruning.shares import Shares
from actprune.pruning.trials import Failure, Run, Trials

Choice = tuple[str, str, frozenset[str]]
"""Module path, attribute, names of the groups whose width the attribute follows."""


@dataclasses.dataclass(frozen=True)
class Repairs:
    """What a rehearsal found out, so that later traces of the same model need none."""

    following: frozenset[Choice] = frozenset()
    """Integers of modules that follow the width of some groups."""
    tied: frozenset[str] = frozenset()
    """Modules whose inner width has to stay equal to the width of their input, and ``path:attribute`` of integers that count
    several widths."""
    locked: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """Group -> why it cannot be cut after all."""
    idle: frozenset[tuple[str, str]] = frozenset()
    """Assumed followers, (module, attribute), that nothing needs: they stay as they are."""
    training: bool = False
    """Whether training mode does to widths what evaluation mode does not, and has to be followed too."""

    def to_dict(self) -> dict[str, Any]:
        """Plain containers, in a fixed order."""
        following = sorted((path, name, sorted(groups)) for path, name, groups in self.following)
        return {
            "following": [list(choice) for choice in following],
            "tied": sorted(self.tied),
            "locked": dict(self.locked),
            "idle": [list(one) for one in sorted(self.idle)],
            "training": self.training,
        }

    @classmethod
    def from_dict(cls, state: Mapping[str, Any]) -> Repairs:
        """Inverse of ``to_dict``."""
        following = frozenset((path, name, frozenset(groups)) for path, name, groups in state["following"])
        idle = frozenset((path, name) for path, name in state.get("idle", ()))
        return cls(following, frozenset(state["tied"]), dict(state["locked"]), idle, state.get("training", False))


def traced(model: nn.Module, example: Example, repairs: Repairs, copies: Copies = NONE) -> Graph:
    """The channel graph, with what a rehearsal found out."""
    return _repaired_graph(Trace(model, example, repairs.training, copies).graph(repairs.tied), repairs)


def _repaired_graph(tied: Graph, repairs: Repairs) -> Graph:
    return with_locks(without(with_followers(tied, repairs.following), repairs.idle), repairs.locked)


def rehearse(model: nn.Module, example: Example, copies: Copies = NONE) -> tuple[Graph, Repairs]:
    """Return a channel graph whose every unlocked group survives a cut, and what had to be done for that.

    A model that runs in training mode has to do so once it is cut. Where it does not, training mode is traced too.
    """
    graph, repairs = _rehearsed(model, [Run(example)], copies)
    groups = candidates(graph)
    for inputs in once_and_twice(example) if groups else ():
        run = Run(inputs, training=True)
        if Trials(model, [run], Shares(graph)).failure(graph, groups) is None:
            break
        with undisturbed(model):
            runs_whole = run.error(model, nullcontext()) is None
        if runs_whole:
            return _rehearsed(model, [Run(example), run], copies)
    return graph, repairs


def _rehearsed(model: nn.Module, runs: Sequence[Run], copies: Copies) -> tuple[Graph, Repairs]:
    training = any(run.training for run in runs)
    tied_graph = functools.cache(Trace(model, runs[0].example, training, copies, tells=True).graph)
    trials = Trials(model, runs, Shares(tied_graph(frozenset())))
    tried: set[tuple[str, object]] = set()
    known: set[tuple[object, str, Failure]] = set()
    repairs, graph, failure = _repaired(trials, tied_graph, Repairs(training=training), tried)
    if unneeded := idle(trials, graph, failure):
        repairs, graph, failure = _repaired(trials, tied_graph, dataclasses.replace(repairs, idle=unneeded), tried)
    drawn_for = frozenset[str]()
    while failure is not None or repairs.tied != drawn_for:
        if failure is None:  # ties made groups of heads of what was wide: what may be taken for equal is told apart anew
            drawn_for, trials = repairs.tied, dataclasses.replace(trials, shares=Shares(graph))
            tried.clear()
        else:  # what nothing helps is locked, and the rest may still be repaired
            locked = {**repairs.locked, **_stuck(trials, graph, candidates(graph), failure)}
            kind = roles(model)[failure.path], re.sub(r"\d+", "", failure.error.partition(": ")[2])
            alike = [seen for *of, seen in known if tuple(of) == kind]
            if all(seen.path == failure.path and seen.error != failure.error for seen in alike):
                tried.clear()  # else every repair has been tried for a module like that one
            known.add((*kind, failure))
            repairs = dataclasses.replace(repairs, locked=locked)
        repairs, graph, failure = _repaired(trials, tied_graph, repairs, tried)
    unneeded = repairs.idle | idle(trials, graph, failure)
    graph.extents.forget()
    return without(graph, unneeded), dataclasses.replace(repairs, idle=unneeded)


def _repaired(
    trials: Trials, tied_graph: Callable[[frozenset[str]], Graph], repairs: Repairs, tried: set[tuple[str, object]]
) -> tuple[Repairs, Graph, Failure | None]:
    """Repair where the cut model fails, as long as that carries it further; and what fails still.

    First integers of the failing module that equal a cut extent are made to follow it; where none helps, the widths that the
    module takes for equal are tied; then the same for the modules that it holds, and for those around it.
    """
    graph = _repaired_graph(tied_graph(repairs.tied), repairs)
    failure = trials.failure(graph, candidates(graph))
    while failure is not None:
        attempt = _proposal(trials.model, graph, failure, repairs, tried)
        if attempt is None:
            break
        attempt, after = _carried(graph, tied_graph, repairs, attempt)
        outcome = trials.failure(after, candidates(after))
        if outcome is not None and outcome.progress < failure.progress:
            # what helps here may hurt a module alike, where other widths are equal: all but that one are repaired, else one
            hurt, whole = outcome.path, attempt
            for fewer in (_of(repairs, whole, hurt, near=False), _of(repairs, whole, failure.path, near=True)):
                if fewer not in (whole, attempt) and outcome is not None and outcome.progress <= failure.progress:
                    attempt, after = _carried(graph, tied_graph, repairs, fewer)
                    outcome = trials.failure(after, candidates(after))
        if outcome is None or outcome.progress > failure.progress:
            repairs, graph, failure = attempt, after, outcome
            tried.clear()
    return repairs, graph, failure


def _carried(
    graph: Graph, tied_graph: Callable[[frozenset[str]], Graph], repairs: Repairs, attempt: Repairs
) -> tuple[Repairs, Graph]:
    """An attempt, and the graph it makes; where it ties what was not tied, with the groups that there are then."""
    tied = tied_graph(attempt.tied)
    if attempt.tied != repairs.tied:
        following, locked = _renamed(graph, tied, attempt.following), _moved(graph, tied, attempt.locked)
        attempt = dataclasses.replace(attempt, following=following, locked=locked)
    return attempt, _repaired_graph(tied, attempt)


def _of(repairs: Repairs, attempt: Repairs, path: str, near: bool) -> Repairs:
    """The same attempt with what it changes in modules that hold a module or are held by it alone, or in all others."""
    if attempt.tied != repairs.tied:
        return attempt

    def around(owner: str) -> bool:
        return owner == "" or f"{path}.".startswith(f"{owner}.") or owner.startswith(f"{path}.")

    chosen = {choice for choice in attempt.following - repairs.following if around(choice[0]) == near}
    return dataclasses.replace(attempt, following=attempt.following & repairs.following | chosen)


def _proposal(
    model: nn.Module, graph: Graph, failure: Failure, repairs: Repairs, tried: set[tuple[str, object]]
) -> Repairs | None:
    """What to try next for a failure in a module, for all modules of the same class and place in their block at once."""
    parts = failure.path.split(".") if failure.path else []
    enclosing = [".".join(parts[:n]) for n in range(len(parts), -1, -1)]
    enclosing[1:1] = held_by(dict(model.named_modules()), failure.path)
    enclosing += failure.unseen
    role = roles(model)
    options = _options(graph)
    followed = {(module, attribute) for module, attribute, _ in repairs.following}
    for here in enclosing:
        own = [(attribute, choices) for (module, attribute), choices in options.items() if module == here]
        # what follows a width already may have taken the wrong one of several that are equal: asked last; settings before it
        for attribute, choices in sorted(own, key=lambda option: ((here, option[0]) in followed, *_of_others(option[0]))):
            beside = {c[2] for c in repairs.following if c[0] == here and _same_list(c[1], attribute)}
            for k, choice in sorted(enumerate(choices), key=lambda numbered: numbered[1][2] in beside):
                if (here, choice) in tried or choice in repairs.following:
                    continue
                others = [(p, found[k]) for (p, name), found in options.items() if name == attribute and len(found) > k]
                alike = {c for p, c in others if role[p] == role[here] and (p == here or (p, attribute) not in followed)}
                tried |= {(c[0], c) for c in alike}
                rivals = _rivals(graph, choice)
                kept = frozenset(c for c in repairs.following if c not in rivals)
                return dataclasses.replace(repairs, following=kept | alike)
        if here in graph.may_tie and (here, "tied") not in tried:
            same = {p for p in graph.may_tie if role[p] == role[here]}
            tried |= {(p, "tied") for p in same}
            return dataclasses.replace(repairs, tied=repairs.tied | same)
        for attribute, choices in own:  # one integer for several widths: no single one of them helps
            shared = {p for p, name in options if name == attribute and role[p] == role[here]}
            tied = repairs.tied | {f"{p}:{attribute}" for p in shared}
            if len(choices) > 1 and (here, f":{attribute}") not in tried and tied != repairs.tied:
                tried |= {(p, f":{attribute}") for p in shared}
                kept = frozenset(c for c in repairs.following if c[1] != attribute or c[0] not in shared)
                return dataclasses.replace(repairs, following=kept, tied=tied)
    return None


def _of_others(name: str) -> tuple[bool, bool]:
    """Whether an integer is one of a list, or of settings."""
    return name.endswith("]"), "." in name


def _same_list(one: str, other: str) -> bool:
    """Whether two are different numbers of one list: those of other layers, which have widths of their own."""
    return one != other and one.endswith("]") and one.partition("[")[0] == other.partition("[")[0]


def _rivals(graph: Graph, choice: Choice) -> set[Choice]:
    """Choices that would set the same integer: the same attribute, of a tuple the same element."""
    owner = _owners(graph)
    same = [(_choice(f, owner), (f.attribute, f.index)) for f in graph.possible if f.module == choice[0]]
    set_by = {place for other, place in same if other == choice}
    return {other for other, place in same if place in set_by}


def _renamed(before: Graph, after: Graph, chosen: frozenset[Choice]) -> frozenset[Choice]:
    """The same choices where ties made one group of several: both graphs list the same possible followers."""
    old, new = _owners(before), _owners(after)
    pairs = zip(before.possible, after.possible, strict=True)
    return frozenset(_choice(g, new) for f, g in pairs if _choice(f, old) in chosen)


def _moved(before: Graph, after: Graph, locked: Mapping[str, str]) -> dict[str, str]:
    """The same locks, on the groups of another graph of the same model that hold what was locked."""
    owner = _owners(after)
    found: dict[str, str] = {}
    for name, reason in locked.items():
        for column, positions in before.group(name).members.items():
            for cls in set(after.columns[column][positions].ravel().tolist()) & owner.keys():
                found.setdefault(owner[cls], reason)
    return found


def _options(graph: Graph) -> dict[tuple[str, str], list[Choice]]:
    """(module, attribute) -> the different widths that the attribute may follow, first those that the module makes."""
    owner = _owners(graph)
    found: dict[tuple[str, str], list[Choice]] = {}
    for follower in graph.possible:
        choices = found.setdefault((follower.module, follower.name), [])
        choice = _choice(follower, owner)
        if choice[2] and choice not in choices:
            choices.append(choice)
    for (module, _), choices in found.items():
        choices.sort(key=lambda choice: not any(_made_by(module, name) for name in choice[2]))
    return found


def _made_by(module: str, group: str) -> bool:
    return f"{group.partition('#')[0]}.".startswith(f"{module}.")


def _owners(graph: Graph) -> dict[int, str]:
    return {cls: group.name for group in graph.groups for cls in group.classes.tolist()}


def _choice(follower: Follower, owner: Mapping[int, str]) -> Choice:
    names = {owner[cls] for cls in set(follower.counts.tolist()) if cls in owner}
    return follower.module, follower.name, frozenset(names)


def with_followers(graph: Graph, chosen: Collection[Choice]) -> Graph:
    """Move the chosen of the possible followers to those that do follow."""
    if not chosen:
        return graph
    owner = _owners(graph)
    following = tuple(f for f in graph.possible if _choice(f, owner) in chosen)
    return dataclasses.replace(graph, followers=graph.followers + following)


def with_locks(graph: Graph, reasons: Mapping[str, str]) -> Graph:
    """Lock groups by name."""
    if not reasons:
        return graph
    groups = tuple(
        dataclasses.replace(g, locked=reasons[g.name]) if g.locked is None and g.name in reasons else g for g in graph.groups
    )
    return dataclasses.replace(graph, groups=groups)


def _stuck(trials: Trials, graph: Graph, groups: Sequence[Group], failure: Failure) -> dict[str, str]:
    """Of groups that fail together some that cannot be cut: those that fail alone, there first, else what halves show."""
    if not groups:
        raise TraceError(f"the model, though nothing is cut, does not do what it did when it was traced: {failure.error}")
    if len(groups) == 1:
        return {groups[0].name: f"the model fails once it is cut: {failure.error}"}
    suspects = [g for g in groups if _meets(g, failure.path)]
    alone = {g.name: found for g in suspects if (found := trials.failure(graph, [g])) is not None}
    here = {name: found for name, found in alone.items() if found.path == failure.path}
    at_once = {name: found for name, found in here.items() if found.progress <= failure.progress}
    if alone:
        return {name: f"the model fails once it is cut: {found.error}" for name, found in (at_once or here or alone).items()}
    middle = len(groups) // 2
    later: tuple[Sequence[Group], Failure] | None = None  # gets further: another failure, which may have a repair
    for half in (groups[:middle], groups[middle:]):
        if (found := trials.failure(graph, half)) is not None:
            if found.progress <= failure.progress:
                return _stuck(trials, graph, half, found)
            later = later or (half, found)
    if later is not None:
        return _stuck(trials, graph, *later)
    # each half survives alone and both together do not: the later one gives way
    return {g.name: f"the model fails once it is cut with others: {failure.error}" for g in groups[middle:]}


def _meets(group: Group, path: str) -> bool:
    """Whether a group's tensors or readers belong to a module or to what it calls."""
    owners = [name.rpartition(".")[0] for name, _ in group.members] + [site.module for site in group.sites]
    return any(owner == path or owner.startswith(f"{path}.") for owner in owners)
