"""What a change of shapes means for the rest of the trainer: process groups, callbacks that remember a best value."""

from __future__ import annotations

import math
from typing import Any

from lightning import Trainer
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from lightning.pytorch.strategies.launchers import _MultiProcessingLauncher
from torch import Tensor
from torch.optim.lr_scheduler import ReduceLROnPlateau

from actprune.core.errors import ConfigError


def check_strategy(trainer: Trainer) -> None:
    """Refuse strategies that hold parameters in pieces, or whose processes cannot hand a smaller network back.

    Raises:
        ConfigError: the strategy is neither a single device nor DDP in processes of their own.
    """
    if not isinstance(trainer.strategy, (SingleDeviceStrategy, DDPStrategy)):
        raise ConfigError(
            f"PruningCallback cannot change the shapes of parameters that {type(trainer.strategy).__name__} holds; "
            'prune on one device or with strategy="ddp", save the pruned network, then shard that one'
        )
    if isinstance(trainer.strategy.launcher, _MultiProcessingLauncher):
        raise ConfigError(
            "after training in spawned or forked processes Lightning loads their weights into a module that was never "
            'pruned; use strategy="ddp", whose processes stay until the end'
        )


def rewrap(trainer: Trainer) -> None:
    """Wrap the module in DDP again: the old wrapper's buckets point at parameters that are gone."""
    strategy = trainer.strategy
    if isinstance(strategy, DDPStrategy):
        strategy.model = trainer.lightning_module
        strategy.configure_ddp()
        strategy._pl_static_graph_delay_done = False


def restart_best(trainer: Trainer) -> None:
    """Let early stopping, monitored checkpoints and plateau schedulers compare only networks of the present size.

    Checkpoints that were the best of a larger network stay on disk.
    """
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, EarlyStopping):
            callback.wait_count = 0
            callback.best_score = _worst(callback.best_score, callback.mode)
        elif isinstance(callback, ModelCheckpoint) and callback.monitor is not None:
            callback.best_k_models = {}
            callback.kth_best_model_path = callback.best_model_path = ""
            callback.best_model_score = callback.current_score = None
            callback.kth_value = _worst(callback.kth_value, callback.mode)
    for config in trainer.lr_scheduler_configs:
        scheduler: Any = config.scheduler
        if isinstance(scheduler, ReduceLROnPlateau):
            scheduler.best = math.inf if scheduler.mode == "min" else -math.inf
            scheduler.num_bad_epochs = scheduler.cooldown_counter = 0


def monitored(trainer: Trainer) -> str | None:
    """The metric that the trainer's own callbacks follow: the first that a checkpoint or early stopping monitors."""
    callbacks = trainer.callbacks  # type: ignore[attr-defined]
    names = [callback.monitor for callback in callbacks if isinstance(callback, (ModelCheckpoint, EarlyStopping))]
    return next((name for name in names if name), None)


def _worst(value: Any, mode: str) -> Tensor:
    worst = math.inf if mode == "min" else -math.inf
    return value.new_tensor(worst) if isinstance(value, Tensor) else Tensor([worst])[0]
