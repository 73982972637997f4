"""Training with PyTorch Lightning: a classification task, the pruning callback, checkpoints, loggers."""

from actprune.training.callback import PruningCallback
from actprune.training.exporting import export, load_exported
from actprune.training.logging import MetricsCSV
from actprune.training.progress import EpochLines, progress_bar
from actprune.training.randomness import RandomState
from actprune.training.spawned import SpawnedDDP
from actprune.training.storage import AtomicCheckpoints, load_task, newest_checkpoint
from actprune.training.task import ClassificationTask

__all__ = [
    "AtomicCheckpoints",
    "ClassificationTask",
    "EpochLines",
    "MetricsCSV",
    "PruningCallback",
    "RandomState",
    "SpawnedDDP",
    "export",
    "load_exported",
    "load_task",
    "newest_checkpoint",
    "progress_bar",
]
