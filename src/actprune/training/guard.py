"""The quality guard: a pruning step that costs more than ``max_metric_drop`` is taken back.

Reference: the best value of the monitored metric in the validations right before the steps so far, so that small losses do not
add up. A step is judged once, by the validation that ends its recovery: when the next step is due; after the last one, as
many epochs later as lay between the last two; after an only one, half-way to the end; or when training ends before that.
While no validation has logged the metric since the step, the verdict waits, and the next step with it. NaN is a loss, and so
is a step that training ends after without a validation that logged the metric.

A step that lost too much: network, optimizers and averaged copies go back to what they were right before it, and the next
step of the schedule goes half-way between the largest reduction that kept the metric and the smallest that lost it; where
these two are closer than ``CLOSE``, or the schedule has no step left, pruning is over. So the run ends with the smallest
network found that kept the metric, and trains it on for what is left of the epochs.

Why not simply stop: the first steps of a schedule are large, and one that lost says only that half of it may do.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

from lightning import Trainer
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint, StochasticWeightAveraging

from actprune.core.errors import ConfigError
from actprune.training.snapshot import Snapshot

CLOSE = 0.02
"""Of the whole reduction: steps smaller than this are not worth an attempt."""

_LESS = re.compile(r"loss|err|nll|mse|mae|perplexity|ppl|wer\b|cer\b|fid\b|distance", re.IGNORECASE)
_MORE = re.compile(r"acc|f1|auc|auroc|precision|recall|iou|dice|map\b|r2|bleu|rouge|psnr|ssim|score", re.IGNORECASE)


class Guard:
    """Judges steps; knows what they are judged by and what to go back to.

    Args:
        monitor: name of the metric.
        max_drop: how much worse than its reference the metric may stay, in its own unit, at least 0.
        mode: ``"max"`` if more is better, ``"min"`` if less is.
    """

    def __init__(self, monitor: str, max_drop: float, mode: str) -> None:
        self.monitor = monitor
        self.max_drop = max_drop
        self.mode = mode
        self.value: float | None = None
        """The metric of the last validation that logged it."""
        self.reference: float | None = None
        """Best value right before a step so far."""
        self.good = 0.0
        """Largest share of the whole reduction that kept the metric."""
        self.failed: float | None = None
        """Smallest share that lost it."""
        self.trial: float | None = None
        """Share of the step that waits for its verdict."""
        self.deadline = -1
        """Epoch after whose validation the verdict falls."""
        self.snapshot: Snapshot | None = None
        """The network before that step."""
        self.seen = False
        """Whether ``value`` is of the network after that step."""
        self.back_at: int | None = None
        """Optimizer steps before the last way back, if no step was taken since and the last checkpoint may not know of it."""
        self.lost: list[dict[str, Any]] = []
        """Steps that were taken back: epoch after which they lost, share, value (None: nobody saw one), reference."""

    def share(self, due: float) -> float | None:
        """How far the step goes that the schedule wants to go to ``due``; None: no further step is worth it."""
        if self.failed is None:
            return due
        return min(due, (self.good + self.failed) / 2) if self.failed - self.good >= CLOSE else None

    def see(self, value: float | None, logged: Iterable[str]) -> None:
        """A validation gave a value, or None.

        Raises:
            ConfigError: the metric was never logged so far.
        """
        if value is None and self.value is None:
            raise ConfigError(
                f"max_metric_drop watches {self.monitor!r}, which validation did not log; it logged "
                f"{', '.join(map(str, logged)) or 'nothing'}: set monitor=..., and log it once per validation"
            )
        if value is not None:
            self.value, self.seen = value, self.snapshot is not None

    def begin(self, share: float, deadline: int, cuts: bool) -> None:
        """A step was decided for the network that was just validated.

        Args:
            share: of the whole reduction that it aims at.
            deadline: epoch after whose validation it is judged.
            cuts: False if nothing has to leave for that.

        Raises:
            ConfigError: the metric is not finite before anything is cut.
        """
        if self.value is None or not math.isfinite(self.value):
            raise ConfigError(f"{self.monitor} is {self.value} before a pruning step: max_metric_drop has nothing to keep")
        if self.reference is None or self._worse(self.reference, self.value) > 0:
            self.reference = self.value
        self.trial, self.deadline, self.seen = share, deadline, False
        if not cuts:
            self._keep()

    def judge(self, epoch: int, last: bool = False) -> None:
        """Judge the step that waits by the last value, if its time has come; ``goes_back`` says whether it lost.

        Args:
            epoch: the last one that was trained.
            last: training ends, so the time has come.
        """
        if self.trial is None or self.snapshot is None or not (last or (self.seen and epoch >= self.deadline)):
            return
        assert self.reference is not None
        assert self.value is not None
        if self.seen and self._worse(self.value, self.reference) <= self.max_drop:
            self._keep()
            return
        value = self.value if self.seen else None
        self.lost.append({"epoch": epoch, "share": self.trial, "value": value, "reference": self.reference})
        self.failed, self.trial = self.trial, None
        self.value = self.reference  # what was measured of the network that lost says nothing of the one before

    def _keep(self) -> None:
        assert self.trial is not None
        self.good, self.trial, self.snapshot = self.trial, None, None

    @property
    def waits(self) -> bool:
        """Whether a step was taken whose verdict is still to come: until then nobody knows what the next one may cost."""
        return self.trial is not None and self.snapshot is not None

    @property
    def goes_back(self) -> bool:
        """Whether a verdict waits for being carried out."""
        return self.trial is None and self.snapshot is not None

    def verdict(self) -> str:
        """The last loss in words."""
        last = self.lost[-1]
        if last["value"] is None:
            return f"no validation saw {self.monitor} after the step, max_metric_drop={self.max_drop:g}"
        return (
            f"{self.monitor} {last['value']:.4g} after recovery, {last['reference']:.4g} before, "
            f"max_metric_drop={self.max_drop:g}"
        )

    def state_dict(self) -> dict[str, Any]:
        """Everything but the settings; plain containers and tensors."""
        named = {name: getattr(self, name) for name in _STATE}
        return {**named, "snapshot": None if self.snapshot is None else self.snapshot.to_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where the checkpoint was written."""
        for name in _STATE:
            setattr(self, name, state.get(name))  # an earlier version had no ``back_at``
        self.snapshot = None if state["snapshot"] is None else Snapshot.from_dict(state["snapshot"])

    def _worse(self, value: float, reference: float) -> float:
        worse = reference - value if self.mode == "max" else value - reference
        return math.inf if math.isnan(worse) else worse


_STATE = ("value", "seen", "reference", "good", "failed", "trial", "deadline", "back_at", "lost")


def direction(monitor: str, mode: str | None, trainer: Trainer) -> str:
    """Whether more of a metric is better: what the user says, what the trainer's callbacks say of it, or its name.

    Raises:
        ConfigError: nothing tells.
    """
    if mode is not None:
        return mode
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, (EarlyStopping, ModelCheckpoint)) and callback.monitor == monitor:
            return callback.mode
    less, more = bool(_LESS.search(monitor)), bool(_MORE.search(monitor))
    if less == more:
        raise ConfigError(
            f"max_metric_drop cannot tell from the name {monitor!r} whether more is better; pass mode='max' or mode='min'"
        )
    return "min" if less else "max"


def drop_limit(stop: str, max_metric_drop: float | None, mode: str | None) -> float | None:
    """What may be lost, from the three settings that say so; None: whatever.

    Raises:
        ConfigError: one of them is out of range.
    """
    if stop not in ("budget", "no_loss"):
        raise ConfigError(f"stop={stop!r} must be 'budget' or 'no_loss'")
    if mode not in (None, "min", "max"):
        raise ConfigError(f"mode={mode!r} must be 'min', 'max' or None")
    if max_metric_drop is not None and not 0 <= max_metric_drop < math.inf:
        raise ConfigError(f"max_metric_drop={max_metric_drop} must be at least 0, in the unit of the metric")
    return 0.0 if stop == "no_loss" and max_metric_drop is None else max_metric_drop


def guard_for(
    trainer: Trainer, monitor: str | None, max_drop: float | None, mode: str | None, earlier: Guard | None = None
) -> Guard | None:
    """The guard of a run; None where nothing is to be kept.

    Args:
        trainer: whose callbacks may tell the direction.
        monitor: name of the metric.
        max_drop: how much may be lost; None: whatever.
        mode: the direction, if the user says it.
        earlier: of the same run before it was fitted on; what that learnt of the same metric stays known.

    Raises:
        ConfigError: no metric is monitored, its direction is unknown, or the final weights are made after the last verdict.
    """
    if max_drop is None:
        return None
    if monitor is None:
        raise ConfigError("max_metric_drop needs a metric to watch: set monitor='val_acc', or whatever validation logs")
    if any(isinstance(callback, StochasticWeightAveraging) for callback in trainer.callbacks):  # type: ignore[attr-defined]
        raise ConfigError(
            "StochasticWeightAveraging makes the final weights when training ends, after the last verdict of max_metric_drop; "
            "use EMAWeightAveraging, whose average is what validation sees, or drop one of the two"
        )
    guard = Guard(monitor, max_drop, direction(monitor, mode, trainer))
    if earlier is not None and (earlier.monitor, earlier.mode) == (guard.monitor, guard.mode):
        for name in (*_STATE, "snapshot"):
            setattr(guard, name, getattr(earlier, name))
    return guard
