"""Training with PyTorch Lightning: a classification task, the pruning callback, checkpoints, loggers."""

from actprune.training.callback import PruningCallback
from actprune.training.constraining import CapacityConstraint
from actprune.training.exporting import export, load_exported
from actprune.training.logging import MetricsCSV
from actprune.training.progress import EpochLines, progress_bar
from actprune.training.randomness import RandomState
from actprune.training.serene import SeReNe
from actprune.training.spawned import SpawnedDDP
from actprune.training.storage import AtomicCheckpoints, load_task, newest_checkpoint
from actprune.training.task import ClassificationTask

__all__ = [
    "AtomicCheckpoints",
    "CapacityConstraint",
    "ClassificationTask",
    "EpochLines",
    "MetricsCSV",
    "PruningCallback",
    "RandomState",
    "SeReNe",
    "SpawnedDDP",
    "export",
    "load_exported",
    "load_task",
    "newest_checkpoint",
    "progress_bar",
]
