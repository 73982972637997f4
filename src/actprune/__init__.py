"""Structured pruning by activation statistics.

Prune a network by what its units do: watch activations, score units, remove the worst, fold what they said into what stays.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from actprune import criteria, statistics
from actprune.core.budget import Budget
from actprune.core.record import SurgeryRecord
from actprune.core.views import Criterion, GroupView, Statistic
from actprune.graph import trace
from actprune.pruning import Pruner, Selection, analyze, prune
from actprune.schedule import Schedule
from actprune.surgery import apply_record, load_pruned, save_pruned

if TYPE_CHECKING:
    from actprune.training.callback import PruningCallback

__version__ = "0.1.0"

__all__ = [
    "Budget",
    "Criterion",
    "GroupView",
    "Pruner",
    "PruningCallback",
    "Schedule",
    "Selection",
    "Statistic",
    "SurgeryRecord",
    "analyze",
    "apply_record",
    "criteria",
    "load_pruned",
    "prune",
    "save_pruned",
    "statistics",
    "trace",
]


def __getattr__(name: str) -> Any:
    """Import the callback on first use: Lightning takes seconds to import, and the library works without it."""
    if name == "PruningCallback":
        from actprune.training.callback import PruningCallback

        return PruningCallback
    raise AttributeError(f"module 'actprune' has no attribute {name!r}")
