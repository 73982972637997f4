"""Ranks with ties, and Spearman's rank correlation.

Formula: equal values share the mean of their ranks; rho is Pearson's correlation of the ranks.
Source: Spearman 1904; ties as in Kendall, Rank Correlation Methods, 1948.
"""

from __future__ import annotations

import math

from torch import Tensor


def ranks(
    x: Tensor,  # (n,)
) -> Tensor:
    """Ranks from 0, equal values sharing the mean of theirs, float64 (n,)."""
    _, place, times = x.unique(return_inverse=True, return_counts=True)
    last = times.cumsum(0)
    return ((last - times + last - 1).double() / 2)[place]


def spearman(
    a: Tensor,  # (n,)
    b: Tensor,  # (n,)
) -> float:
    """Rank correlation in [-1, 1]; NaN where one of the two is constant."""
    one, other = (r - r.mean() for r in (ranks(a), ranks(b)))
    scale = math.sqrt(float(one.square().sum() * other.square().sum()))
    return min(1.0, max(-1.0, float(one @ other) / scale)) if scale else math.nan
