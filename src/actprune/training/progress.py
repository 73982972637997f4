"""What a person sees while training: Rich's bar on a terminal, one line per epoch in a file or a pipe."""

from __future__ import annotations

import sys
from typing import Any

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar, RichProgressBar

from actprune.training.logging import logged_since


class EpochLines(ProgressBar):
    """One plain line per training epoch with what was measured in it: a log file stays readable."""

    def __init__(self) -> None:
        super().__init__()
        self._enabled = True
        self._shown: dict[str, Any] = {}

    @property
    def is_enabled(self) -> bool:
        """Whether lines are printed."""
        return self._enabled

    def disable(self) -> None:
        """Print nothing."""
        self._enabled = False

    def enable(self) -> None:
        """Print again."""
        self._enabled = True

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print epoch and metrics."""
        if self._enabled and trainer.is_global_zero:
            new = logged_since(trainer, self._shown)
            named = {name: float(value) for name, value in new.items() if not name.startswith(("prune/", "lr-"))}
            shown = ", ".join(f"{name} {value:.4f}" for name, value in sorted(named.items()))
            self._shown = dict(trainer.callback_metrics)
            print(f"epoch {trainer.current_epoch + 1}/{trainer.max_epochs}: {shown}", flush=True)


class Bar(RichProgressBar):
    """Rich's bar without the logger's version number, which means nothing to a reader."""

    def get_metrics(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
        """What stands beside the bar."""
        metrics = super().get_metrics(trainer, pl_module)
        return {name: value for name, value in metrics.items() if name != "v_num"}


def progress_bar() -> ProgressBar:
    """The progress display that suits standard output."""
    return Bar(leave=False) if sys.stdout.isatty() else EpochLines()
