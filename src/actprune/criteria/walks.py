"""Sign walks: the expected supremum of signed counts over a chain of sets.

Formula: for nested sets of sizes t_1 <= t_2 <= ... the sums of fair signs over them are W(t_1), W(t_2), ... with W a
random walk of steps +-1, whatever the sets contain. Hence E max_k |W(t_k)| is a function of the sizes. The same walks
serve every unit: their comparison is less noisy than with independent draws, and their order does not matter.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from actprune.statistics.counter import hashed, signs, uniform

WALK_STEPS = 1 << 16
"""Longest walk that is drawn sign by sign; longer ones take this many Gaussian steps of several signs each."""


_NUMBERS_AT_ONCE = 1 << 22


def sup_of_walks(
    walks: Tensor,  # (M, T + 1) W(0) = 0, ..., W(T)
    times: Tensor,  # (U, K) int64 in [0, T]
    symmetric: bool,
) -> Tensor:
    """max_k |W(t_k)|, or max_k max(0, W(t_k)) (the empty set is in the class) where not ``symmetric``; (M, U)."""
    seen = walks[:, times]
    return (seen.abs() if symmetric else seen).amax(2).clamp(min=0)


def threshold_complexity(
    sizes: Tensor,  # (U, K) float64, #{i: a_i >= t_k} for every threshold, in any order
    n: int,
    replicates: int,
    seed: int,
    symmetric: bool = True,
) -> Tensor:
    """Rademacher complexity of {1[a >= t_k]} (``symmetric``: of both signs of it) on ``n`` samples, float64 (U,)."""
    length = min(n, WALK_STEPS)
    times = (sizes.cpu() * (length / n)).round().long()
    steps = torch.arange(length, device="cpu")
    total = torch.zeros(len(times), dtype=torch.float64, device="cpu")
    at_once = max(1, _NUMBERS_AT_ONCE // (length + times.numel()))
    for numbers in torch.arange(replicates, device="cpu").split(at_once):
        if n <= WALK_STEPS:
            drawn = signs(hashed(0, numbers.unsqueeze(1), steps), 1, seed, torch.float64).squeeze(2)
        else:
            middle = uniform(seed, numbers.unsqueeze(1), steps) + 2.0**-54  # inside (0, 1)
            drawn = torch.special.ndtri(middle) * math.sqrt(n / length)
        walks = torch.nn.functional.pad(drawn.cumsum(1), (1, 0))
        total += sup_of_walks(walks, times, symmetric).sum(0)
    return total / (replicates * n)
