"""Run validation batches outside the loop, where Lightning runs no sanity check before training: when it goes on with a run."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from typing import Any

from lightning import LightningModule, Trainer
from lightning.pytorch.utilities import CombinedLoader
from lightning.pytorch.utilities.seed import isolate_rng
from torch.nn.parameter import is_lazy

from actprune.core.calling import undisturbed
from actprune.core.copied import Copies
from actprune.core.errors import ActPruneError, ConfigError
from actprune.training.example import Network, Watcher
from actprune.training.loaders import spared
from actprune.training.replay import harmless, validate

_log = logging.getLogger(__name__)


def validation_networks(trainer: Trainer, task: LightningModule, wanted: Sequence[str], copies: Copies) -> list[Network] | None:
    """Draw the first batch of validation loaders, validate them and say which networks were run.

    Random numbers, metrics, logs and the training mode are afterwards as they were. A step that fails is run again after the
    LightningModule's hooks that come before it; the attributes that these make stay, as they do after a sanity check. None if
    the step does not work outside the loop even so, or if a wanted module takes no part in these batches: then real validation
    batches show the networks.

    Args:
        trainer: its loaders give the batches.
        task: whose ``validation_step`` runs.
        wanted: dotted names of the networks; empty: what it runs.
        copies: dotted name of a copy -> of what it is one.

    Raises:
        ConfigError: validation has no batch.
        TraceError: the step calls no network.
    """
    if any(is_lazy(p) for p in task.parameters()):
        return None  # a lazy layer gets its shape in a run that counts
    stage = trainer.state.stage
    with isolate_rng():
        trainer.validating = True
        try:
            for prepares in (False, True):
                try:
                    return _networks(trainer, task, wanted, copies, prepares)
                except ActPruneError:
                    raise
                except Exception as error:
                    _log.info("validation_step does not run outside the loop (%s)", error)
        finally:
            trainer.state.stage = stage
    return None


def _networks(
    trainer: Trainer, task: LightningModule, wanted: Sequence[str], copies: Copies, prepares: bool
) -> list[Network] | None:
    """The networks that the first batches show; the hooks that come before run if ``prepares``, and what they set stays."""
    made: dict[str, Any] = {}
    watcher = Watcher(task, wanted, copies)
    loop = trainer.fit_loop.epoch_loop.val_loop
    loop.setup_data()
    real = [] if loop._combined_loader is None else loop._combined_loader.flattened
    with undisturbed(task), harmless(task), trainer.precision_plugin.val_step_context(), spared(real) as loaders:
        before = dict(vars(task))
        for number, (batch, loader, several) in enumerate(_first_batches(trainer, task, loaders)):
            if prepares:
                if number == 0:
                    task.on_validation_start()
                    task.on_validation_epoch_start()
                task.on_validation_batch_start(batch, 0, *([loader] if several else []))
                made.update({name: value for name, value in vars(task).items() if before.get(name, made) is not value})
            try:
                watcher.start(batch, loader)
                validate(task, batch, loader)
            finally:
                watcher.stop()
            if not watcher.missing:
                break
    for name, value in made.items():  # a replay of the step needs it too
        object.__setattr__(task, name, value)
    return watcher.networks(batch, loader)


def _first_batches(trainer: Trainer, task: LightningModule, loaders: list[Any]) -> Iterator[tuple[Any, int, bool]]:
    """The first batch of every loader, or of all if they are combined; with its loader, and whether there are several."""
    loop = trainer.fit_loop.epoch_loop.val_loop
    combined, n = loop._combined_loader, 0
    if together := combined is not None and combined._mode != "sequential":
        assert combined is not None
        whole = CombinedLoader(combined.iterables, combined._mode)  # its iterators are its own
        whole.flattened, whole.limits = loaders, loop.max_batches
        loaders = [whole]
    for number, loader in enumerate([] if loop.skip else loaders):
        drawn = next(iter(loader), None) if together or loop.max_batches[number] else None
        if drawn is not None:
            batch = trainer.precision_plugin.convert_input(drawn[0] if together else drawn)
            batch = task._on_before_batch_transfer(batch, number)
            n += 1
            yield trainer.strategy.batch_to_device(batch, dataloader_idx=number), number, len(loaders) > 1
    if not n:
        raise ConfigError(
            f"PruningCallback observes activations in validation, and validation has no batch "
            f"({len(loaders)} loaders, limit_val_batches={trainer.limit_val_batches}); give fit a validation loader "
            "with data"
        )
