"""Integers that a trace assumed to be widths, for they are equal to one, but that nothing needs: they must not change.

A module's ``dim`` may be an axis, its ``width`` that of an image, its ``num_features`` a divisor. Where such a number follows
a cut without need, the cut model runs and computes something else.
"""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Collection, Mapping

import numpy as np
from torch import nn

from actprune.graph import Graph, Group
from actprune.pruning.trials import Failure, Trials


def idle(trials: Trials, graph: Graph, failure: Failure | None) -> frozenset[tuple[str, str]]:
    """(module, attribute) of assumed followers without which the cut model runs as well, or gets further.

    Modules of the same class and place in their block are asked at once.

    Args:
        trials: what a cut model has to survive.
        graph: the channel graph.
        failure: of these trials with this graph, if they fail.
    """
    groups = candidates(graph)
    cuttable = np.append(graph.removed({group.name: range(group.size) for group in groups}), False)
    role = roles(trials.model)
    alike: dict[tuple[object, str], set[tuple[str, str]]] = defaultdict(set)
    for follower in graph.followers:
        if follower.assumed and cuttable[follower.counts].any():
            alike[role[follower.module], follower.attribute].add((follower.module, follower.attribute))
    found: frozenset[tuple[str, str]] = frozenset()
    for asked in (*alike.values(), *alike.values()):  # what another one hides is found the second time
        if asked <= found:
            continue
        after = trials.failure(without(graph, found | asked), groups)
        if after is None or (failure is not None and after.progress > failure.progress):
            found, failure = found | asked, after
    return found


def without(graph: Graph, idle: Collection[tuple[str, str]]) -> Graph:
    """The same graph, where these assumed followers follow nothing."""
    if not idle:
        return graph
    followers = tuple(f for f in graph.followers if not (f.assumed and (f.module, f.attribute) in idle))
    return dataclasses.replace(graph, followers=followers)


def candidates(graph: Graph) -> list[Group]:
    """Groups that a rehearsal can cut."""
    return [group for group in graph.unlocked if group.size > 1]


def roles(model: nn.Module) -> Mapping[str, object]:
    """Module path -> its class and its place in its block: numbers of blocks do not count."""
    return {p: (type(m), tuple("*" if x.isdigit() else x for x in p.split("."))) for p, m in model.named_modules()}
