"""When pruning steps are due and how much of the whole reduction each of them owes: a pure function of the epoch."""

from __future__ import annotations

import math
from dataclasses import dataclass

from actprune.core.errors import ConfigError
from actprune.schedule.curves import CURVES

FIRST_SHARE = 0.2
"""Share of the epochs that is trained before the first step."""
LAST_SHARE = 0.6
"""Share of the epochs after which no step is left; the rest is for recovery."""
DEFAULT_STEPS = 5


@dataclass(frozen=True)
class Schedule:
    """Pruning steps at ``start``, ``start + interval``, ...; the reduction follows ``curve``.

    What is None adapts to the number of epochs: the steps begin after about 20 % of the epochs and end by 60 %, and at
    least one epoch of training follows each. What is given is kept, or refused where it does not fit.

    Raises:
        ConfigError: an unknown curve, or a start, interval or number of steps that makes no sense.
    """

    curve: str = "cubic"
    """``one_shot``, ``linear`` or ``cubic``."""
    start: int | None = None
    """Epoch, counted from 0, after whose validation the first step is decided; None: after about 20 % of the epochs."""
    interval: int | None = None
    """Epochs from one step to the next; None: spread until about 60 % of the epochs."""
    steps: int | None = None
    """Number of steps; None: 1 for ``one_shot``, else 5, or as many as fit."""

    def __post_init__(self) -> None:
        """Check every field by itself."""
        if self.curve not in CURVES:
            raise ConfigError(f"curve={self.curve!r} is not known; choose one of {', '.join(CURVES)}")
        for name, least in (("start", 0), ("interval", 1), ("steps", 1)):
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < least):
                raise ConfigError(f"{name}={value!r} must be a whole number >= {least}, or None to fit the epochs")
        if self.curve == "one_shot" and self.steps not in (None, 1):
            raise ConfigError(f"curve='one_shot' has 1 step, got steps={self.steps}; choose linear or cubic for more")

    def epochs(self, max_epochs: int) -> list[int]:
        """Epochs, counted from 0, after whose validation a step is decided; ascending.

        Raises:
            ConfigError: the steps do not fit with one epoch of training after the last.
        """
        latest = max_epochs - 2
        if latest < 0:
            raise ConfigError(f"max_epochs={max_epochs} leaves no epoch after a pruning step; train at least 2")
        first = self.start if self.start is not None else min(latest, max(0, round(FIRST_SHARE * max_epochs) - 1))
        if first > latest:
            raise ConfigError(f"start={first} must be at most {latest} with max_epochs={max_epochs}; start earlier")
        recovering = max(first, min(latest, math.floor(LAST_SHARE * max_epochs) - 1))
        wanted = 1 if self.curve == "one_shot" else self.steps or DEFAULT_STEPS
        if self.steps is None:
            steps = min(wanted, (recovering - first) // (self.interval or 1) + 1)
        else:
            steps = wanted
            recovering = max(recovering, min(latest, first + (steps - 1) * (self.interval or 1)))
        interval = self.interval or max(1, (recovering - first) // max(1, steps - 1))
        last = first + (steps - 1) * interval
        if last > latest:
            raise ConfigError(
                f"steps={steps} every interval={interval} epochs from epoch {first} end at epoch {last}, but the last "
                f"may be at {latest} with max_epochs={max_epochs}; take fewer steps, a shorter interval or more epochs"
            )
        return [first + step * interval for step in range(steps)]

    def due(self, epoch: int, max_epochs: int) -> float | None:
        """Fraction of the whole reduction that is due after ``epoch``; None when no step is.

        Raises:
            ConfigError: as ``epochs``.
        """
        epochs = self.epochs(max_epochs)
        if epoch not in epochs:
            return None
        return CURVES[self.curve]((epochs.index(epoch) + 1) / len(epochs))
