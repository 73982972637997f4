"""How criteria agree with the measured effect of removal, and with each other: rank correlations within groups.

Formula: Spearman's rho over the units of one group, averaged over the groups; the interval is the percentile bootstrap of that
mean over groups (Efron 1979), so it speaks of other groups of such a network, not of other networks. With the effect, the units
are those that were replaced alone; between criteria, all units of the group. Either needs three of them.

The effect is measured on a sample, so nothing agrees with it wholly. Its rank correlation h between two halves of the samples
gives what a criterion that knew the true effect would reach: ``sqrt(2 h / (1 + h))`` (Spearman 1910, Brown 1910).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from actprune.core.ranks import spearman
from actprune.pruning.influence import GroupInfluence, Influence

EFFECT = "effect"
"""Name of the measured rise of the loss when a unit alone is replaced."""
LEAST = 3
"""Units that a group needs to say anything about ranks."""
_RESAMPLES = 2000


@dataclass(frozen=True)
class Agreement:
    """Mean rank correlations over the groups of one network."""

    names: Sequence[str]
    """The effect, then the criteria."""
    mean: Sequence[Sequence[float]]
    """(K, K); NaN where no group has two different values of both."""
    low: Sequence[Sequence[float]]
    """Lower end of the 95 % interval; NaN where fewer than two groups are behind the mean."""
    high: Sequence[Sequence[float]]
    n_groups: Sequence[Sequence[int]]
    """Groups behind each mean."""
    by_group: dict[str, Sequence[Sequence[float]]]
    """Group name -> (K, K)."""
    halves: float = math.nan
    """Rank correlation of the effect on one half of the samples with that on the other, mean over groups; NaN if unknown."""

    @property
    def ceiling(self) -> float:
        """What a criterion that knew the true effect would reach against the measured one, about; NaN if unknown."""
        return math.sqrt(max(2 * self.halves / (1 + self.halves), 0.0)) if self.halves > -1 else math.nan


def agreement(influence: Influence, seed: int = 0) -> Agreement:
    """Correlate what an analysis found.

    Args:
        influence: what ``analyze`` returned.
        seed: of the bootstrap.
    """
    names = (EFFECT, *influence.criteria)
    groups = [group for group in influence.groups if group.size >= LEAST]
    found = torch.stack([*(_of_group(group, names) for group in groups), _nothing(names)])[:-1]
    known = ~found.isnan()
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(max(len(groups), 1), (_RESAMPLES, len(groups)), generator=generator, device="cpu")
    # how often each group was drawn: all resamples of all matrices at once would be gigabytes
    times = found.new_zeros(drawn.shape).scatter_add_(1, drawn, torch.ones_like(drawn, dtype=found.dtype))
    means = torch.tensordot(times, found.nan_to_num(), 1) / torch.tensordot(times, known.to(found.dtype), 1)
    means = means.masked_fill(known.sum(0) < 2, math.nan)  # one group says nothing of others
    low, high = means.nanquantile(torch.tensor([0.025, 0.975], dtype=means.dtype, device="cpu"), dim=0)
    return Agreement(
        names=names,
        mean=(found.nansum(0) / known.sum(0)).tolist(),
        low=low.tolist(),
        high=high.tolist(),
        n_groups=known.sum(0).tolist(),
        by_group={group.name: matrix.tolist() for group, matrix in zip(groups, found, strict=True)},
        halves=_halves([group for group in groups if len(group.units) >= LEAST]),
    )


def _halves(groups: Sequence[GroupInfluence]) -> float:
    both = [group.unit_loss_halves for group in groups if group.unit_loss_halves]
    pairs = [torch.tensor(pair, dtype=torch.float64, device="cpu") for pair in both]
    known = [rho for rho in (spearman(*pair) for pair in pairs) if not math.isnan(rho)]
    return sum(known) / len(known) if known else math.nan


def _nothing(names: Sequence[str]) -> Tensor:
    return torch.full((len(names), len(names)), math.nan, dtype=torch.float64, device="cpu")


def _of_group(group: GroupInfluence, names: Sequence[str]) -> Tensor:
    scores = {name: torch.tensor(values, dtype=torch.float64, device="cpu") for name, values in group.scores.items()}
    alone = torch.tensor(list(group.units), device="cpu")
    effect = torch.tensor(group.unit_loss, dtype=torch.float64, device="cpu")
    matrix = _nothing(names)
    for i, one in enumerate(names):
        for j, other in enumerate(names[: i + 1]):
            if not {one, other} <= {EFFECT, *scores}:
                continue
            if other == EFFECT and len(alone) < LEAST:
                continue
            if i == j:
                rho = 1.0
            elif other == EFFECT:
                rho = spearman(scores[one][alone], effect)
            else:
                rho = spearman(scores[one], scores[other])
            matrix[i, j] = matrix[j, i] = rho
    return matrix
