"""Types of the top-level configuration keys: Hydra checks overrides against them before anything runs.

What is inside a group is checked against the signature of its ``_target_`` (``build.py``): there is no second list of
the arguments of every class.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING, OmegaConf


class Task(Enum):
    """What the job does."""

    train = "train"
    """Train, prune, test, report."""
    plan = "plan"
    """Trace and observe the untrained network, and print what would leave; train nothing."""
    prune = "prune"
    """Load weights, prune without training, test, report."""
    analyze = "analyze"
    """Load weights and measure what every group of units contributes, and which criterion sees it."""
    capacity = "capacity"
    """Load weights and measure Lipschitz constants and distances to initialisation, before and after pruning."""


@dataclass
class Config:
    """The whole configuration."""

    task: Task = Task.train
    seed: int = 1
    """Seeds initialisation, the order of samples, augmentation and drawn criteria; at least 0."""
    ckpt_path: str | None = None
    """Checkpoint to go on with."""
    resume: str | None = None
    """Output folder of a job or a sweep that was cut off: go on there, with the settings it was started with."""
    weights: str | None = None
    """File of trained weights, or a checkpoint, for ``task=prune``, ``analyze`` and ``capacity`` (the last two: pruned networks
    too); null: what the model's own ``weights`` says."""
    calibration: int = 2000
    """Training images that ``task=prune``, ``analyze`` and ``capacity`` observe, at least 1; as they are, never
    augmented."""
    export: list[str] = field(default_factory=list)
    """Formats that the network is written in at the end: onnx, torch_export, state_dict."""
    optimize: str = "val_accuracy"
    """Key of the summary that the job returns."""
    budget: Any = MISSING
    paths: Any = MISSING
    data: Any = MISSING
    model: Any = MISSING
    module: Any = MISSING
    optimizer: Any = MISSING
    scheduler: Any = None
    schedule: Any = MISSING
    compensation: Any = None
    pruner: Any = None
    callbacks: Any = None
    logger: Any = None
    trainer: Any = MISSING
    analyze: Any = MISSING
    capacity: Any = MISSING


def register() -> None:
    """Make the schema known to Hydra under the name ``schema``, and ``${by_task:...}`` to configurations."""
    ConfigStore.instance().store(name="schema", node=Config)
    OmegaConf.register_new_resolver("by_task", _by_task, replace=True)


def _by_task(task: Task | str, training: str, other: str) -> str:
    """One value for tasks that train the network, or say how training will go; another where no training follows."""
    name = task if isinstance(task, str) else task.name
    return training if name in (Task.train.name, Task.plan.name) else other
