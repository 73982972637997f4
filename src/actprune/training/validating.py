"""The loss on the validation data of the network as it is, outside the loop."""

from __future__ import annotations

from itertools import islice
from typing import Any

import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.utilities.seed import isolate_rng

from actprune.core.calling import undisturbed
from actprune.training.example import n_samples
from actprune.training.gradients import Loss, loss_of
from actprune.training.replay import harmless


def validation_loss(trainer: Trainer, task: LightningModule, loss: Loss | None) -> float:
    """Mean loss per sample over all validation loaders and processes, in evaluation mode.

    Batches are those that validation uses (``limit_val_batches``). Random numbers, metrics, logs, buffers and the training mode
    are afterwards as they were. For use after a validation epoch: its loaders are run again.

    Args:
        trainer: in ``fit``.
        task: what is trained.
        loss: module and batch -> mean loss of the batch; None: what ``training_step`` returns.

    Raises:
        ObservationError: the loss does not run on a validation batch.
    """
    loop = trainer.fit_loop.epoch_loop.val_loop
    loaders = [] if loop._combined_loader is None else loop._combined_loader.flattened
    total, n = 0.0, 0
    with isolate_rng(), torch.no_grad(), undisturbed(task), harmless(task):
        for number, (loader, limit) in enumerate(zip(loaders, loop.max_batches, strict=True)):
            stop = None if limit == float("inf") else int(limit)
            for batch_idx, batch in enumerate(islice(loader, stop)):
                batch = _on_device(trainer, task, batch, number)
                size = n_samples(batch)
                total += float(loss_of(trainer, task, loss, batch, batch_idx)) * size
                n += size
    sums = torch.tensor([total, n], dtype=torch.float64, device=trainer.strategy.root_device)
    total, n = trainer.strategy.reduce(sums, reduce_op="sum").tolist()
    return total / n


def _on_device(trainer: Trainer, task: LightningModule, batch: Any, dataloader_idx: int) -> Any:
    batch = task._on_before_batch_transfer(trainer.precision_plugin.convert_input(batch), dataloader_idx)
    return trainer.strategy.batch_to_device(batch, dataloader_idx=dataloader_idx)
