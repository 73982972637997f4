"""Random number generators in checkpoints: a resumed run shuffles and augments as the uninterrupted one would have."""

from __future__ import annotations

import logging
import random
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from lightning import Callback, LightningModule, Trainer

_LOG = logging.getLogger(__name__)


class RandomState(Callback):
    """Carries the state of Python's, NumPy's and torch's generators from the checkpoint into the run that goes on.

    Of several processes each gets its own back: when a checkpoint is written they all send theirs to each other. A run of
    another number of processes goes on with the generators as they are, and says so.
    """

    def __init__(self) -> None:
        super().__init__()
        self._rank, self._processes = 0, 1
        self._loaded: dict[str, Any] | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Note how many processes there are, and which this is."""
        self._rank, self._processes = trainer.global_rank, trainer.world_size

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """The epoch that was resumed had batches left."""
        self._loaded = None

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Set the generators again where the resumed epoch had no batch left: Lightning drew an order for it all the same."""
        if self._loaded is not None:
            _restore(self._loaded, self._processes == 1)
            self._loaded = None

    def state_dict(self) -> dict[str, Any]:
        """The states in plain containers and tensors, of every process; all of them call this when a checkpoint is written."""
        own = _state(self._processes == 1)
        if self._processes == 1:
            return own
        if not dist.is_initialized():  # processes of another kind cannot ask each other
            return {}
        states: list[Any] = [None] * self._processes
        dist.all_gather_object(states, own)
        return {"processes": states}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Set the generators; those of other devices than the present ones are left alone."""
        states = state_dict.get("processes", [state_dict] if state_dict else [])
        if len(states) == self._processes:
            self._loaded = states[self._rank]
            _restore(self._loaded, self._processes == 1)
        elif states and self._rank == 0:
            _LOG.warning(
                "the checkpoint holds the random state of %d processes, this run has %d: it draws, shuffles and augments "
                "otherwise than the uninterrupted run would have", len(states), self._processes,
            )  # fmt: skip


def _state(alone: bool) -> dict[str, Any]:
    """The generators of this process; one that is not alone has one device."""
    name, keys, *rest = np.random.get_state(legacy=True)
    cuda = []
    if torch.cuda.is_available():
        cuda = torch.cuda.get_rng_state_all() if alone else [torch.cuda.get_rng_state()]
    return {
        "python": random.getstate(),
        "numpy": (name, np.asarray(keys).tolist(), *rest),
        "torch": torch.get_rng_state(),
        "cuda": cuda,
    }


def _restore(state: dict[str, Any], alone: bool) -> None:
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, np.asarray(keys, dtype=np.uint32), *rest))
    torch.set_rng_state(state["torch"].cpu())
    cuda = [one.cpu() for one in state["cuda"]]
    if alone and len(cuda) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(cuda)
    elif cuda and not alone and torch.cuda.is_available():
        torch.cuda.set_rng_state(cuda[0])
