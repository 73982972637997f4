"""DDP in processes that Lightning spawns or forks, as in notebooks, whose pruned network comes back to the caller.

Lightning's own launcher loads the weights of the first process into the caller's module, which was never pruned, and no
callback is asked in the caller's process. This one sends the surgery records along, gives the caller's module the pruned shape
first, and brings the pruning callback's history up to date.
"""

from __future__ import annotations

import io
from typing import Any

import torch
from lightning import Trainer
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.strategies.launchers import _MultiProcessingLauncher

from actprune.core.errors import ConfigError
from actprune.core.record import SurgeryRecord
from actprune.training.resume import CheckpointHooks

_KEY = "actprune"
_SHOWN = ("history", "events", "stopped")


class SpawnedDDP(DDPStrategy):
    """``Trainer(strategy=SpawnedDDP("fork"))`` instead of ``"ddp_fork"``, ``SpawnedDDP("spawn")`` instead of ``"ddp_spawn"``.

    Args:
        start_method: ``"spawn"``, ``"fork"`` or ``"forkserver"``.
        options: as ``DDPStrategy`` takes them.

    Raises:
        ConfigError: the start method is none of these.
    """

    def __init__(self, start_method: str = "spawn", **options: Any) -> None:
        if start_method not in ("spawn", "fork", "forkserver"):
            raise ConfigError(
                f"start_method={start_method!r} must be spawn, fork or forkserver; for processes that run the script again "
                'there is strategy="ddp"'
            )
        super().__init__(start_method=start_method, **options)  # type: ignore[arg-type]

    def _configure_launcher(self) -> None:
        self._launcher = ReturningLauncher(self, start_method=self._start_method)  # type: ignore[arg-type]


class ReturningLauncher(_MultiProcessingLauncher):
    """Hands the shape of the pruned network back with its weights."""

    def get_extra_results(self, trainer: Trainer) -> dict[str, Any]:
        """In the first process: records and history, as bytes."""
        extra = super().get_extra_results(trainer)
        hooks = CheckpointHooks.attach(trainer.lightning_module)
        shown = {name: getattr(c, name) for c in _pruning(trainer) for name in _SHOWN}
        content = {"records": {path: record.to_dict() for path, record in hooks.records().items()}, "shown": shown}
        buffer = io.BytesIO()
        torch.save(content, buffer)
        return {**extra, _KEY: buffer.getvalue()}

    def _recover_results_in_main_process(self, worker_output: Any, trainer: Trainer) -> None:
        content = torch.load(io.BytesIO(worker_output.extra[_KEY]), weights_only=True)
        records = {path: SurgeryRecord.from_dict(record) for path, record in content["records"].items()}
        CheckpointHooks.attach(trainer.lightning_module).reshape(records)
        for callback in _pruning(trainer):
            for name, value in content["shown"].items():
                setattr(callback, name, value)
        super()._recover_results_in_main_process(worker_output, trainer)


def _pruning(trainer: Trainer) -> list[Any]:
    return [callback for callback in trainer.callbacks if all(hasattr(callback, name) for name in _SHOWN)]  # type: ignore[attr-defined]
