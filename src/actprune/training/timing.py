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
    later one. Every step is followed by a validation, so that what it cost is known.
    """

    max_epochs: int
    epochs: tuple[int, ...]
    """Epochs, counted from 0, after whose validation a step is due; ascending."""
    shares: tuple[float, ...]
    """Of the whole reduction, due by each of them."""
    every: int
    """Epochs from one validation to the next."""

    @classmethod
    def of(cls, schedule: Schedule, trainer: Trainer) -> Timetable:
        """Fit a schedule to a trainer.

        Steps that the schedule placed by itself move to the last validation that another one follows.

        Raises:
            ConfigError: the number of epochs is unknown, or no validation would follow the last step.
        """
        max_epochs = trainer.max_epochs
        if max_epochs is None or max_epochs < 1:
            raise ConfigError(
                f"the pruning schedule needs to know how long training lasts, got max_epochs={max_epochs}; "
                "set Trainer(max_epochs=...), beside max_steps if need be"
            )
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            return cls(max_epochs, (), (), 1)  # one epoch, to see that everything runs: there is no room for a step
        epochs = schedule.epochs(max_epochs)
        every = trainer.check_val_every_n_epoch or 1  # None: validation counts batches, whose number is not known yet
        latest = (max_epochs // every - 1) * every - 1
        placed = schedule.steps is None and schedule.interval is None and (schedule.start or 0) <= latest
        if max(epochs) > latest and not placed:
            where = f"the last validation that another one follows is in epoch {latest}"
            raise ConfigError(
                f"the last pruning step is due after epoch {max(epochs)}, but with check_val_every_n_epoch={every} and "
                f"max_epochs={max_epochs} {where if latest >= 0 else 'no validation is followed by another one'}; "
                "start the schedule earlier, take fewer steps, or validate more often"
            )
        steps = {min(epoch, latest): schedule.due(epoch, max_epochs) or 0.0 for epoch in epochs}
        return cls(max_epochs, tuple(steps), tuple(steps.values()), every)

    def due(self, decided: int, epoch: int) -> float | None:
        """Share of the reduction due after ``epoch``, with steps up to epoch ``decided`` done; None if nothing is."""
        steps = [share for step, share in zip(self.epochs, self.shares, strict=True) if decided < step <= epoch]
        return steps[-1] if steps else None

    def taken(self) -> list[tuple[int, float]]:
        """The steps as validations allow them: epochs after whose validation one is due, and shares."""
        found: list[tuple[int, float]] = []
        for epoch in range(self.every - 1, self.max_epochs, self.every):
            share = self.due(found[-1][0] if found else -1, epoch)
            found += [] if share is None else [(epoch, share)]
        return found

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
    # Lightning before 2.6 sets it when training begins, after the sanity check
    every, batches = getattr(trainer, "val_check_batch", None), trainer.num_training_batches
    if every is None or math.isinf(every) or math.isinf(batches) or trainer.check_val_every_n_epoch is None:
        return True
    return trainer.fit_loop.epoch_loop.batch_idx + 1 + every > batches


def epochs_trained(trainer: Trainer) -> int:
    """How many epochs were trained, the last one perhaps in part; unlike ``current_epoch`` also right after a resume."""
    return trainer.fit_loop.epoch_progress.current.processed  # type: ignore[attr-defined, no-any-return]
