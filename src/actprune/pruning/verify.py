"""Prove before any training that the groups can leave: rehearse a cut, repair what can be repaired, lock the rest.

Every second unit of all groups is cut, the model runs once, everything is put back. Where a module fails, integers it keeps
that equal a cut extent are made to follow; if that does not help, the groups are bisected until the culprits are known, and
those are locked with the error as the reason.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from torch import nn

from actprune.core.calling import Example, call, undisturbed
from actprune.core.stack import module_stack
from actprune.graph import Graph, Group
from actprune.pruning.plans import draft
from actprune.surgery import rehearsed


@dataclasses.dataclass(frozen=True)
class _Failure:
    path: str
    """Path of the module that was running."""
    error: str


def rehearse(model: nn.Module, example: Example, graph: Graph) -> Graph:
    """Return the graph with attributes that must follow, and with every group locked that breaks the model when it is cut."""
    candidates = [group for group in graph.unlocked if group.size > 1]
    graph = repair(model, example, graph, candidates)
    return with_locks(graph, _culprits(model, example, graph, candidates))


def repair(model: nn.Module, example: Example, graph: Graph, groups: Sequence[Group]) -> Graph:
    """Let attributes follow in the modules where the cut model fails, as long as that carries it further."""
    repaired: set[str] = set()
    while (failure := _failure(model, example, graph, groups)) is not None:
        # the innermost module that keeps a suspicious integer and was not tried yet
        parts = failure.path.split(".") if failure.path else []
        paths = [".".join(parts[:n]) for n in range(len(parts), -1, -1)]
        holding = {follower.module for follower in graph.possible}
        path = next((p for p in paths if p in holding and p not in repaired), None)
        if path is None:
            break
        repaired.add(path)
        tried = with_followers(graph, {path})
        after = _failure(model, example, tried, groups)
        if after is None or after != failure:
            graph = tried
    return graph


def with_followers(graph: Graph, paths: set[str]) -> Graph:
    """Move the possible followers of some modules to those that do follow."""
    chosen = tuple(f for f in graph.possible if f.module in paths)
    rest = tuple(f for f in graph.possible if f.module not in paths)
    return dataclasses.replace(graph, followers=graph.followers + chosen, possible=rest)


def with_locks(graph: Graph, reasons: dict[str, str]) -> Graph:
    """Lock groups by name."""
    if not reasons:
        return graph
    groups = tuple(
        dataclasses.replace(g, locked=reasons[g.name]) if g.locked is None and g.name in reasons else g
        for g in graph.groups
    )
    return dataclasses.replace(graph, groups=groups)


def _culprits(model: nn.Module, example: Example, graph: Graph, groups: Sequence[Group]) -> dict[str, str]:
    """Groups that cannot be cut: first those that meet where the model fails are tried one by one, then halves."""
    found: dict[str, str] = {}
    groups = list(groups)
    while groups and (failure := _failure(model, example, graph, groups)) is not None:
        suspects = [g for g in groups if _meets(g, failure.path)] if len(groups) > 1 else groups
        guilty = {}
        for group in suspects:
            alone = _failure(model, example, graph, [group])
            if alone is not None:
                guilty[group.name] = f"the model fails once it is cut: {alone.error}"
        if not guilty:
            middle = len(groups) // 2
            guilty = _culprits(model, example, graph, groups[:middle]) | _culprits(model, example, graph, groups[middle:])
        if not guilty:
            # each half survives alone and both together do not: the later one gives way
            guilty = {g.name: f"the model fails once it is cut with others: {failure.error}" for g in groups[middle:]}
        found |= guilty
        groups = [g for g in groups if g.name not in guilty]
    return found


def _meets(group: Group, path: str) -> bool:
    """Whether a group's tensors or readers belong to a module or to what it calls."""
    owners = [name.rpartition(".")[0] for name, _ in group.members] + [site.module for site in group.sites]
    return any(owner == path or owner.startswith(f"{path}.") for owner in owners)


def _failure(model: nn.Module, example: Example, graph: Graph, groups: Sequence[Group]) -> _Failure | None:
    plan = draft(model, graph, {g.name: range(1, g.size, 2) for g in groups})
    with undisturbed(model), module_stack(model) as stack, rehearsed(model, plan):
        try:
            call(model, example)
        except Exception as error:
            text = str(error).strip().partition("\n")[0]
            path = stack[-1].path
            return _Failure(path, f"{type(error).__name__} in {path or 'the model'}: {text}")
    return None
