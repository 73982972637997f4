"""Which units of groups an analysis replaces: shares by the rank of every criterion, drawn shares, and units alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from actprune.core.checks import is_whole
from actprune.core.errors import ConfigError
from actprune.graph import Group
from actprune.statistics.counter import uniform

RANDOM = "random"
"""Name of the baseline, which is always among the criteria."""
ALONE, _TIES = 0, 1
"""Streams of drawn orders: of units alone, and of units that a criterion holds equal; the latter and those after it are the
random rankings, too."""
_STREAMS = 1 << 16
"""Of one seed; those of the next one follow."""


@dataclass(frozen=True)
class Removals:
    """What is replaced.

    Raises:
        ConfigError: a value is outside what it may be.
    """

    shares: Sequence[float] = (0.05, 0.1, 0.25, 0.5)
    """Shares of a group that are replaced together, in (0, 1]."""
    n_units: int = 16
    """Units per group that are replaced alone, drawn; all where the group has no more."""
    draws: int = 3
    """Random rankings behind a random share, at least 1."""
    seed: int = 0
    """Of all draws."""
    samples: int | None = None
    """Validation samples on which shares are measured, the first ones, whole batches; None: all, as units alone always are:
    their effects are small, and rank only where samples are many."""

    def __post_init__(self) -> None:
        """Check before any work is done."""
        if not self.shares or not all(0 < share <= 1 for share in self.shares):
            raise ConfigError(f"shares={list(self.shares)} must be 1 or more numbers in (0, 1], e.g. [0.25, 0.5]")
        least = 1 if self.samples is None else self.samples
        for name, value in (("n_units", self.n_units), ("draws", self.draws), ("samples", least)):
            if not (is_whole(value) and value >= 1):
                raise ConfigError(f"{name}={value} must be a whole number of at least 1")


def removal_rows(
    scores: Mapping[str, Mapping[str, Sequence[float]]], groups: Sequence[Group], removals: Removals
) -> list[tuple[tuple[str, str, float, int], list[dict[str, frozenset[int]]]]]:
    """(criterion, end, share, units) and what is replaced for it: one choice, or one per draw.

    Groups that a criterion does not score stay whole by it.
    """
    rows = []
    for name in dict.fromkeys(name for g in groups for name in scores[g.name]):
        scored = [g for g in groups if name in scores[g.name]]
        drawn = name == RANDOM
        values = [[0] * g.size if drawn else scores[g.name][name] for g in scored]
        rankings = [
            {g.name: drawn_order(x, removals.seed, stream, g) for g, x in zip(scored, values, strict=True)}
            for stream in range(_TIES, _TIES + (removals.draws if drawn else 1))
        ]
        for end in ("random",) if drawn else ("lowest", "highest"):
            for share in removals.shares:
                counts = {g.name: max(1, round(share * g.size)) for g in scored}
                choices = [
                    {g: frozenset((order[::-1] if end == "highest" else order)[: counts[g]]) for g, order in ranking.items()}
                    for ranking in rankings
                ]
                rows.append(((name, end, share, sum(counts.values())), choices))
    return rows


def drawn_order(values: Sequence[float], seed: int, stream: int, group: Group) -> list[int]:
    """Units from the lowest value up, equal ones in a drawn order that depends on seed, stream, group and unit alone."""
    counters = torch.tensor(int(group.classes[0]), device="cpu"), torch.arange(group.size, device="cpu")
    drawn = uniform(seed * _STREAMS + stream, *counters).argsort()
    return drawn[torch.tensor(values, dtype=torch.float64, device="cpu")[drawn].argsort(stable=True)].tolist()
