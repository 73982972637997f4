"""What a change of shapes means for the rest of the trainer: process groups, callbacks that remember a best value."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from typing import Any

from lightning import Trainer
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from lightning.pytorch.strategies.launchers import _MultiProcessingLauncher
from torch import Tensor
from torch.optim.lr_scheduler import ReduceLROnPlateau

from actprune.core.errors import ConfigError
from actprune.training.spawned import ReturningLauncher


def check_strategy(trainer: Trainer) -> None:
    """Refuse strategies that hold parameters in pieces, or whose processes cannot hand a smaller network back.

    Raises:
        ConfigError: the trainer is of another package, or the strategy is neither a single device nor DDP in processes of
            their own.
    """
    if not isinstance(trainer, Trainer):
        raise ConfigError(
            f"the trainer is a {type(trainer).__module__}.{type(trainer).__name__}, and PruningCallback works with that of the "
            "package lightning; write `import lightning.pytorch as pl` for `import pytorch_lightning as pl`"
        )
    if not isinstance(trainer.strategy, (SingleDeviceStrategy, DDPStrategy)):
        raise ConfigError(
            f"PruningCallback cannot change the shapes of parameters that {type(trainer.strategy).__name__} holds; "
            'prune on one device or with strategy="ddp", save the pruned network, then shard that one'
        )
    launcher = trainer.strategy.launcher
    if isinstance(launcher, _MultiProcessingLauncher) and not isinstance(launcher, ReturningLauncher):
        raise ConfigError(
            "after training in spawned or forked processes Lightning loads their weights into a module that was never "
            f'pruned; use strategy=actprune.training.SpawnedDDP("{launcher._start_method}"), or strategy="ddp"'
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
    for callback in _comparing(trainer):
        if isinstance(callback, EarlyStopping):
            callback.wait_count = 0
            callback.best_score = _worst(callback.best_score, callback.mode)
        else:
            callback.best_k_models = {}
            callback.kth_best_model_path = callback.best_model_path = ""
            callback.best_model_score = callback.current_score = None
            callback.kth_value = _worst(callback.kth_value, callback.mode)
    for scheduler in _plateaus(trainer):
        scheduler.best = math.inf if scheduler.mode == "min" else -math.inf
        scheduler.num_bad_epochs = scheduler.cooldown_counter = 0


def best_values(trainer: Trainer) -> dict[str, Any]:
    """What ``restart_best`` forgets, as plain containers and tensors."""
    return {
        "callbacks": {callback.state_key: copy.deepcopy(callback.state_dict()) for callback in _comparing(trainer)},
        "plateaus": [[s.best, s.num_bad_epochs, s.cooldown_counter] for s in _plateaus(trainer)],
    }


def return_to_best(trainer: Trainer, values: Mapping[str, Any]) -> None:
    """Let them compare again with what ``best_values`` said; files of the time since stay on disk."""
    for callback in _comparing(trainer):
        if callback.state_key in values["callbacks"]:
            state = copy.deepcopy(values["callbacks"][callback.state_key])
            if isinstance(callback, ModelCheckpoint):
                state["last_model_path"] = callback.last_model_path  # the last one is still the last
            callback.load_state_dict(state)
    for scheduler, (best, bad, cooldown) in zip(_plateaus(trainer), values["plateaus"], strict=True):
        scheduler.best, scheduler.num_bad_epochs, scheduler.cooldown_counter = best, bad, cooldown


def save_last_again(trainer: Trainer, since: int) -> None:
    """Write last checkpoints anew that were written before the network changed, which was after optimizer step ``since``."""
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if not isinstance(callback, ModelCheckpoint) or callback._last_global_step_saved > since:
            continue
        latest = callback.monitor is None and callback.save_top_k == 1  # its one file is that of the last epoch
        path = callback.last_model_path if callback.save_last else callback.best_model_path if latest else ""
        if path and path.startswith(str(callback.dirpath)):  # a run that is resumed elsewhere knows the file of its origin
            trainer.save_checkpoint(path, callback.save_weights_only)


def monitored(trainer: Trainer) -> str | None:
    """The metric that the trainer's own callbacks follow: the first that a checkpoint or early stopping monitors."""
    callbacks = trainer.callbacks  # type: ignore[attr-defined]
    names = [callback.monitor for callback in callbacks if isinstance(callback, (ModelCheckpoint, EarlyStopping))]
    return next((name for name in names if name), None)


def _comparing(trainer: Trainer) -> list[Any]:
    callbacks = trainer.callbacks  # type: ignore[attr-defined]
    return [c for c in callbacks if isinstance(c, EarlyStopping) or (isinstance(c, ModelCheckpoint) and c.monitor is not None)]


def _plateaus(trainer: Trainer) -> list[Any]:
    schedulers = [config.scheduler for config in trainer.lr_scheduler_configs]
    return [scheduler for scheduler in schedulers if isinstance(scheduler, ReduceLROnPlateau)]


def _worst(value: Any, mode: str) -> Tensor:
    worst = math.inf if mode == "min" else -math.inf
    return value.new_tensor(worst) if isinstance(value, Tensor) else Tensor([worst])[0]
