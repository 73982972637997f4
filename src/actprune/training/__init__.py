"""Training with PyTorch Lightning: a classification task, the pruning callback, checkpoints, loggers."""

from actprune.training.callback import PruningCallback
from actprune.training.logging import MetricsCSV
from actprune.training.progress import EpochLines, progress_bar
from actprune.training.randomness import RandomState
from actprune.training.task import ClassificationTask

__all__ = ["ClassificationTask", "EpochLines", "MetricsCSV", "PruningCallback", "RandomState", "progress_bar"]
