"""When a pruning step is due: the schedule's epochs against the epochs in which the trainer validates."""

from __future__ import annotations

import math
from dataclasses import dataclass

from lightning import LightningModule, Trainer

from actprune.core.errors import ConfigError
from actprune.schedule import Schedule


@dataclass(frozen=True)
class Timetable:
    """The steps of a schedule for one trainer.

    A step that falls on an epoch without validation is taken after the next validation; if two fall together, the
    later one.
    """

    schedule: Schedule
    max_epochs: int
    epochs: tuple[int, ...]
    """Epochs, counted from 0, after whose validation a step is due."""

    @classmethod
    def of(cls, schedule: Schedule, trainer: Trainer) -> Timetable:
        """Fit a schedule to a trainer.

        Raises:
            ConfigError: the number of epochs is unknown, or the last step has no validation before the last epoch.
        """
        max_epochs = trainer.max_epochs
        if max_epochs is None or max_epochs < 1:
            raise ConfigError(
                f"the pruning schedule needs to know how long training lasts, got max_epochs={max_epochs}; "
                "set Trainer(max_epochs=...), beside max_steps if need be"
            )
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            return cls(schedule, max_epochs, ())  # one epoch, to see that everything runs: there is no room for a step
        table = cls(schedule, max_epochs, tuple(schedule.epochs(max_epochs)))
        every = trainer.check_val_every_n_epoch or 1
        last_validation = (max_epochs - 1) // every * every - 1
        if table.last > last_validation:
            raise ConfigError(
                f"the last pruning step is due after epoch {table.last}, but with check_val_every_n_epoch={every} and "
                f"max_epochs={max_epochs} the last validation that training follows is in epoch {last_validation}; "
                "start the schedule earlier, take fewer steps, or validate more often"
            )
        return table

    @property
    def last(self) -> int:
        """Epoch of the last step; -1 if there is none."""
        return max(self.epochs, default=-1)

    def due(self, decided: int, epoch: int) -> float | None:
        """Share of the reduction due after ``epoch``, with steps up to epoch ``decided`` done; None if nothing is."""
        steps = [step for step in self.epochs if decided < step <= epoch]
        return self.schedule.due(max(steps), self.max_epochs) if steps else None

    def recovered(self, decided: int) -> int:
        """Epoch after whose validation the step decided after epoch ``decided`` has had its recovery.

        That is when the next step is due; after the last one as long as after the one before it, and after an only one half of
        the epochs that are left, so that training goes on with whichever network is kept.
        """
        later = [step for step in self.epochs if step > decided]
        if later:
            return min(later)
        if len(self.epochs) > 1:
            return decided + self.epochs[-1] - self.epochs[-2]
        return decided + max(1, (self.max_epochs - 1 - decided) // 2)


def check_validation(trainer: Trainer, task: LightningModule) -> None:
    """Refuse a run in which nothing can be observed.

    Raises:
        ConfigError: there is no validation.
    """
    if not trainer.enable_validation:
        raise ConfigError(
            f"PruningCallback observes activations in validation, but {type(task).__name__} has none "
            f"(limit_val_batches={trainer.limit_val_batches}); define validation_step and give fit a validation loader"
        )


def ends_epoch(trainer: Trainer) -> bool:
    """Whether the validation that runs now is the last one in its training epoch."""
    every, batches = trainer.val_check_batch, trainer.num_training_batches
    if every is None or math.isinf(every) or math.isinf(batches) or trainer.check_val_every_n_epoch is None:
        return True
    return trainer.fit_loop.epoch_loop.batch_idx + 1 + every > batches
