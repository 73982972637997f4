"""Run one validation batch outside the loop, where Lightning runs no sanity check before training."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from lightning import LightningModule, Trainer
from lightning.pytorch.utilities.seed import isolate_rng
from torch.nn.parameter import is_lazy

from actprune.core.calling import undisturbed
from actprune.core.errors import ActPruneError, ConfigError
from actprune.training.example import Network, Watcher
from actprune.training.replay import harmless, validate

_log = logging.getLogger(__name__)


def validation_networks(trainer: Trainer, task: LightningModule, wanted: Sequence[str] = ()) -> list[Network] | None:
    """Draw the first validation batch, validate it and say which networks were run.

    Random numbers, metrics, logs and the training mode are afterwards as they were. None if the step does not work
    outside the loop (it may need what other hooks set up), or if a wanted module takes no part in this batch: then real
    validation batches show the networks.

    Raises:
        ConfigError: validation has no batch.
        TraceError: the step calls no network.
    """
    if any(is_lazy(p) for p in task.parameters()):
        return None  # a lazy layer gets its shape in a run that counts
    watcher, stage = Watcher(task, wanted), trainer.state.stage
    with isolate_rng():
        trainer.validating = True
        try:
            batch = _first_batch(trainer, task)
            with undisturbed(task), harmless(task), trainer.precision_plugin.val_step_context():
                watcher.start(batch)
                validate(task, batch)
                watcher.stop()
            return watcher.networks(batch)
        except ActPruneError:
            raise
        except Exception as error:
            _log.info("validation_step does not run outside the loop (%s); waiting for validation", error)
            return None
        finally:
            watcher.stop()
            trainer.state.stage = stage


def _first_batch(trainer: Trainer, task: LightningModule) -> Any:
    loop = trainer.fit_loop.epoch_loop.val_loop
    loop.setup_data()
    loaders = [] if loop._combined_loader is None else loop._combined_loader.flattened
    batch = next(iter(loaders[0]), None) if loaders and not loop.skip else None
    if batch is None:
        raise ConfigError(
            f"PruningCallback observes activations in validation, and validation has no batch "
            f"({len(loaders)} loaders, limit_val_batches={trainer.limit_val_batches}); give fit a validation loader "
            "with data"
        )
    batch = task._on_before_batch_transfer(trainer.precision_plugin.convert_input(batch), 0)
    return trainer.strategy.batch_to_device(batch, dataloader_idx=0)
