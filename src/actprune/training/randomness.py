"""Random number generators in checkpoints: a resumed run shuffles and augments as the uninterrupted one would have."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch
from lightning import Callback, LightningModule, Trainer


class RandomState(Callback):
    """Carries the state of Python's, NumPy's and torch's generators from the checkpoint into the run that goes on.

    Only in runs of one process: a checkpoint is written by the first process alone, and with its state all of them would
    draw the same.
    """

    def __init__(self) -> None:
        super().__init__()
        self._alone = True
        self._loaded: dict[str, Any] | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Note how many processes there are."""
        self._alone = trainer.world_size == 1

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """The epoch that was resumed had batches left."""
        self._loaded = None

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Set the generators again where the resumed epoch had no batch left: Lightning drew an order for it all the same."""
        if self._loaded is not None:
            self.load_state_dict(self._loaded)
            self._loaded = None

    def state_dict(self) -> dict[str, Any]:
        """The states in plain containers and tensors; empty in a run of several processes."""
        if not self._alone:
            return {}
        name, keys, *rest = np.random.get_state(legacy=True)
        return {
            "python": random.getstate(),
            "numpy": (name, np.asarray(keys).tolist(), *rest),
            "torch": torch.get_rng_state(),
            "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Set the generators; those of other devices than the present ones are left alone."""
        if not state_dict or not self._alone:
            return
        self._loaded = state_dict
        version, internal, gauss = state_dict["python"]
        random.setstate((version, tuple(internal), gauss))
        name, keys, *rest = state_dict["numpy"]
        np.random.set_state((name, np.asarray(keys, dtype=np.uint32), *rest))
        torch.set_rng_state(state_dict["torch"].cpu())
        if len(state_dict["cuda"]) == torch.cuda.device_count():
            torch.cuda.set_rng_state_all([state.cpu() for state in state_dict["cuda"]])
