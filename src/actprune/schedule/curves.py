"""Pruning curves: pure functions of progress p in [0, 1] to the fraction of the whole reduction that is due.

Every curve rises from 0 at p = 0 to 1 at p = 1.
"""

from __future__ import annotations

from collections.abc import Callable


def one_shot(progress: float) -> float:
    """Everything with the first step: 0 at p = 0, else 1."""
    return float(progress > 0)


def linear(progress: float) -> float:
    """Equal steps: p."""
    return float(progress)


def cubic(progress: float) -> float:
    """Fast first, while there is much to remove: 1 - (1 - p)^3 (Zhu & Gupta, arXiv:1710.01878)."""
    return 1.0 - (1.0 - progress) ** 3


CURVES: dict[str, Callable[[float], float]] = {"one_shot": one_shot, "linear": linear, "cubic": cubic}
