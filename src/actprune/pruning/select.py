"""Select: scores and a budget become units that leave.

Units of all groups are put in one order and the shortest prefix of it that meets the budget leaves. ``global`` orders by
scores that are comparable across groups after normalisation, ``uniform`` by rank within the group (every group loses the
same share of its original width). Costs are exact, so the prefix is found by bisection: the budget is met to within one
unit's worth. A criterion with a threshold says itself which units leave; there the budget is a limit.
"""

from __future__ import annotations

import dataclasses
import numbers
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from actprune.core.checks import is_whole
from actprune.core.errors import BudgetError, ConfigError
from actprune.graph import Graph, Group
from actprune.pruning.apart import keep_apart

_SCOPES = ("global", "uniform")
_NORMALISERS = ("mean", "max", "standard", "rank", "none")


@dataclass(frozen=True)
class Selection:
    """How units of different groups compete.

    Raises:
        ConfigError: a setting is outside what it may be.
    """

    scope: str = "global"
    """``global``: one ranking over all groups; ``uniform``: every group loses the same share of its original width."""
    normalise: str | None = None
    """What makes scores of different groups comparable: divide by the group's ``mean`` or ``max``, ``standard`` score,
    ``rank`` within the group, or ``none``. None: ``none`` for criteria whose scores are comparable, else ``mean``."""
    max_ratio: float = 0.9
    """Largest share of a group's original units that may leave, in [0, 1)."""
    round_to: int = 1
    """Widths that are cut are left at a multiple of this many units."""
    ignore: Sequence[str] = ()
    """Modules whose outputs stay as wide as they are, with all that they are added to: names in the pruned network, ``*`` for
    any part of one, e.g. ``["head", "layer4.*"]``; what is inside a named module is meant too."""

    def __post_init__(self) -> None:
        """Check every setting."""
        if self.scope not in _SCOPES:
            raise ConfigError(f"selection scope={self.scope!r} is not known; choose one of {', '.join(_SCOPES)}")
        if self.normalise is not None and self.normalise not in _NORMALISERS:
            raise ConfigError(f"selection normalise={self.normalise!r} is not known; choose one of {', '.join(_NORMALISERS)}")
        if not isinstance(self.max_ratio, numbers.Real) or not 0 <= self.max_ratio < 1:
            raise ConfigError(f"selection max_ratio={self.max_ratio!r} must be in [0, 1), the share that may leave, e.g. 0.9")
        if not is_whole(self.round_to) or self.round_to < 1:
            raise ConfigError(f"selection round_to={self.round_to!r} must be at least 1, a whole number, e.g. 8")
        if not isinstance(self.ignore, (list, tuple)) or not all(isinstance(name, str) and name for name in self.ignore):
            raise ConfigError(f"selection ignore={self.ignore!r} must be a list of names of modules, e.g. ['head', 'layer4.*']")
        object.__setattr__(self, "ignore", tuple(self.ignore))


def removable(group: Group, original: int, max_ratio: float) -> int:
    """How many units of a group may still leave: ``max_ratio`` of the original width holds always, one unit stays."""
    least = max(1, int(np.ceil(original * (1 - max_ratio) - 1e-9)))
    return max(0, group.size - least)


def select(
    graph: Graph,
    scores: Mapping[str, Tensor],
    unit: str,
    target: float,
    selection: Selection,
    originals: Mapping[str, int],
) -> dict[str, list[int]]:
    """Choose the units that leave.

    Args:
        graph: the channel graph of the model as it is.
        scores: group name -> (U,) scores, higher = keep; groups without scores stay whole.
        unit: ``"params"``, ``"macs"`` or ``"units"``.
        target: how many of them may be left.
        selection: how groups compete.
        originals: group name -> width before any pruning.

    Returns:
        Group name -> sorted indices of the units that leave; empty when the target is met already.

    Raises:
        BudgetError: the target is below what locked groups and ``max_ratio`` allow.
    """
    if graph.left(unit) <= target:
        return {}
    scored = [g for g in graph.unlocked if g.name in scores]
    groups = [g for g in scored if removable(g, originals.get(g.name, g.size), selection.max_ratio) > 0]
    if not groups:
        raise BudgetError(
            f"no unit may leave: {len(graph.groups)} groups, {len(scored)} of them unlocked and scored, none wider than what "
            f"max_ratio={selection.max_ratio} leaves; raise max_ratio, or see the locks: "
            "print(actprune.trace(model, example_inputs))"
        )
    caps = [removable(g, originals.get(g.name, g.size), selection.max_ratio) for g in groups]
    order = _Order(graph, groups, _order(groups, scores, caps, selection, originals), unit, selection.round_to)
    least = order.cost(len(order))
    if least > target:
        rounding = f", round_to={selection.round_to}" if selection.round_to > 1 else ""
        raise BudgetError(
            f"the budget asks for {target:,.0f} {unit}, the smallest reachable is {least:,} of {graph.left(unit):,}: "
            f"max_ratio={selection.max_ratio}{rounding} and locked groups keep the rest{_unscored(graph, scores)}; raise the "
            f"budget or max_ratio{' or lower round_to' * bool(rounding)}"
        )
    for prefix in range(order.first_within(target), len(order) + 1):
        units = order.units(prefix, more=True)
        if graph.left(unit, graph.removed(units)) <= target:
            return units
    raise BudgetError(
        f"the budget asks for {target:,.0f} {unit}, which widths that have to stay different do not allow: the code does "
        "something else where they are equal; raise the budget or max_ratio"
    )


def select_below(
    graph: Graph,
    scores: Mapping[str, Tensor],
    threshold: float,
    unit: str,
    limit: float,
    selection: Selection,
    originals: Mapping[str, int],
) -> dict[str, list[int]]:
    """Choose all units that score at most ``threshold``, lowest first, as long as ``limit`` is left.

    Args:
        graph: the channel graph of the model as it is.
        scores: group name -> (U,) scores, compared as they are; groups without scores stay whole.
        threshold: the largest score that leaves.
        unit: ``"params"``, ``"macs"`` or ``"units"``.
        limit: how many of them are left at least.
        selection: ``max_ratio`` and ``round_to`` hold; the rest has no effect.
        originals: group name -> width before any pruning.

    Returns:
        Group name -> sorted indices of the units that leave; empty where none does.
    """
    plain = dataclasses.replace(selection, scope="global", normalise="none")
    scored = [g for g in graph.unlocked if g.name in scores and (scores[g.name] <= threshold).any()]
    below = [int((scores[g.name] <= threshold).sum()) for g in scored]
    may = [removable(g, originals.get(g.name, g.size), selection.max_ratio) for g in scored]
    leaving = [(g, min(n, most)) for g, n, most in zip(scored, below, may, strict=True) if most]
    if not leaving:
        return {}
    groups, caps = zip(*leaving, strict=True)
    order = _Order(graph, groups, _order(groups, scores, caps, plain, originals), unit, selection.round_to)
    if order.cost(len(order)) >= limit:
        return order.units(len(order))
    first = order.first_within(limit)
    return order.units(first if order.cost(first) >= limit else first - 1)


class _Order:
    """Units in the order in which they leave, and what any prefix of it would leave.

    Args:
        graph: the channel graph.
        groups: the groups that lose units.
        order: (index of the group, unit), from the first to leave.
        unit: ``"params"``, ``"macs"`` or ``"units"``.
        round_to: widths that are cut are left at a multiple of this.
    """

    def __init__(
        self, graph: Graph, groups: Sequence[Group], order: Sequence[tuple[int, int]], unit: str, round_to: int
    ) -> None:
        self._graph, self._groups, self._order = graph, groups, order
        self._unit, self._round_to = unit, round_to
        self._ranked: list[list[int]] = [[] for _ in groups]
        for index, chosen in order:
            self._ranked[index].append(chosen)

    def __len__(self) -> int:
        """Units that may leave."""
        return len(self._order)

    def units(self, prefix: int, more: bool = False) -> dict[str, list[int]]:
        """Group name -> sorted indices of the units that leave; ``more``: rather a few more than fewer."""
        ranked = {g.name: units for g, units in zip(self._groups, self._ranked, strict=True)}
        taken = dict(zip(ranked, self._counts(prefix).tolist(), strict=True))
        taken = keep_apart(self._graph, ranked, taken, self._round_to, more)
        return {name: sorted(ranked[name][:n]) for name, n in taken.items() if n}

    def cost(self, prefix: int) -> int:
        """Parameters, multiply-adds or units that would be left."""
        removed = np.zeros(self._graph.n_classes, dtype=bool)
        for group, units, n in zip(self._groups, self._ranked, self._counts(prefix), strict=True):
            removed[group.classes[units[:n]]] = True
        return self._graph.left(self._unit, removed)

    def first_within(self, target: float) -> int:
        """The shortest prefix that leaves at most ``target``; the whole order must."""
        low, high = 0, len(self)  # cost(low) > target >= cost(high)
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if self.cost(middle) <= target else (middle, high)
        return high

    def _counts(self, prefix: int) -> NDArray[np.int64]:
        taken = np.bincount([g for g, _ in self._order[:prefix]], minlength=len(self._groups))
        if self._round_to > 1:
            kept = np.array([g.size for g in self._groups]) - taken
            kept = -(-kept // self._round_to) * self._round_to
            taken = np.maximum(0, np.array([g.size for g in self._groups]) - kept)
        return taken


def _unscored(graph: Graph, scores: Mapping[str, Tensor]) -> str:
    names = [g.name for g in graph.unlocked if g.name not in scores]
    return f", and so do {len(names)} groups that the criterion does not score ({', '.join(names[:5])})" if names else ""


def _order(
    groups: Sequence[Group],
    scores: Mapping[str, Tensor],
    caps: Sequence[int],
    selection: Selection,
    originals: Mapping[str, int],
) -> list[tuple[int, int]]:
    """(group index, unit) from the first to leave to the last that may."""
    keys, owners, units = [], [], []
    for index, (group, cap) in enumerate(zip(groups, caps, strict=True)):
        raw = scores[group.name].detach().double().cpu()
        ascending = torch.argsort(raw, stable=True)[:cap]
        if selection.scope == "uniform":  # the share of the original width that has left with the unit
            original = max(group.size, originals.get(group.name, group.size))
            keys.append((np.arange(1, cap + 1) + original - group.size) / original)
        else:
            keys.append(normalise(raw, selection.normalise or "mean")[ascending].numpy())
        owners.append(np.full(cap, index))
        units.append(ascending.numpy())
    order = np.lexsort((np.concatenate(owners), np.concatenate(keys)))
    return list(zip(np.concatenate(owners)[order].tolist(), np.concatenate(units)[order].tolist(), strict=True))


def normalise(scores: Tensor, how: str) -> Tensor:
    """Make scores of one group comparable with those of others; the order within the group stays."""
    if how == "mean":
        scale = scores.abs().mean()
        return scores / scale if scale > 0 else scores
    if how == "max":
        scale = scores.abs().max()
        return scores / scale if scale > 0 else scores
    if how == "standard":
        deviation = scores.std(correction=0)
        return (scores - scores.mean()) / deviation if deviation > 0 else torch.zeros_like(scores)
    if how == "rank":
        ranks = torch.empty_like(scores)
        ranks[torch.argsort(scores, stable=True)] = torch.arange(len(scores), dtype=scores.dtype, device="cpu")
        return (ranks + 1) / len(scores)
    return scores
