"""What must be on disk while training goes on: the surgery record; and the history that the pictures are drawn from."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning import Callback, LightningModule, Trainer

from actprune.core.files import atomic_path
from actprune.core.record import SurgeryRecord
from actprune.pruning import Pruner
from actprune.training import PruningCallback
from actprune.training.records import merged

RECORD = "surgery_record.json"


class Recorder(Callback):
    """Keeps one row per validation epoch, and writes the surgery record whenever it has grown.

    Args:
        pruning: the job's pruning callback; None for a baseline.
        folder: where the record is written.
    """

    def __init__(self, pruning: PruningCallback | None, folder: Path) -> None:
        super().__init__()
        self._pruning = pruning
        self._folder = folder
        self._written = 0
        self.history: list[dict[str, Any]] = []
        """Rows with epoch, step (pruning steps so far), params, val_accuracy and val_loss."""

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Add the row of this epoch."""
        if trainer.sanity_checking or trainer.state.fn != "fit":
            return
        self.add(trainer.current_epoch, pl_module, trainer.callback_metrics)

    def add(self, epoch: int, task: LightningModule, metrics: Mapping[str, Any]) -> None:
        """Add a row: what validation logged of the network as it is after an epoch."""
        named = {name.replace("/", "_"): float(value) for name, value in metrics.items()}
        self.history.append(
            {
                "epoch": epoch,
                "step": len(self._record().steps),
                "params": sum(p.numel() for p in task.parameters()),
                "val_accuracy": named.get("val_accuracy"),
                "val_loss": named.get("val_loss"),
            }
        )

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the surgery record if a step was executed since the last time."""
        record = self._record()
        if trainer.is_global_zero and len(record.steps) != self._written:
            self._written = len(record.steps)
            write_json(record.to_dict(), self._folder / RECORD)

    def _record(self) -> SurgeryRecord:
        return net_record({} if self._pruning is None else self._pruning.pruners)

    def state_dict(self) -> dict[str, Any]:
        """The history."""
        return {"history": self.history}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with the history of the checkpoint."""
        self.history = [dict(row) for row in state_dict["history"]]


def net_record(pruners: Mapping[str, Pruner]) -> SurgeryRecord:
    """The record of the task's network ``net``, of all its pruned parts together."""
    return merged({path.removeprefix("net").lstrip("."): pruner.record for path, pruner in pruners.items()})


def write_json(content: Any, path: Path) -> None:
    """Write JSON; the file is whole or absent."""
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n", encoding="utf-8")
