"""Where numbers go: one CSV row per step, and what pruning adds to every logger."""

from __future__ import annotations

import csv
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning import Trainer
from lightning.fabric.loggers.logger import rank_zero_experiment
from lightning.pytorch.loggers import Logger, WandbLogger
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from actprune.core.files import atomic_path


class MetricsCSV(Logger):
    """One CSV file, one row per optimizer step at which something was logged.

    Lightning's own CSV logger starts a new row for every call, so that the numbers of one epoch are spread over
    several rows, and deletes the file when a run is resumed. Here calls with the same step share a row, a resumed run
    goes on in the same file, and the file is replaced as a whole: a reader never sees half of it.

    Args:
        path: the file; its folder is made if need be.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        super().__init__()
        self._path = Path(path)
        self._rows: dict[int, dict[str, Any]] | None = None

    @property
    def name(self) -> str:
        """The file's name without its ending."""
        return self._path.stem

    @property
    def version(self) -> str:
        """There is one version only."""
        return ""

    @property
    def root_dir(self) -> str:
        """The file's folder."""
        return str(self._path.parent)

    @property
    def log_dir(self) -> str:
        """The file's folder."""
        return self.root_dir

    @property
    @rank_zero_experiment
    def experiment(self) -> dict[int, dict[str, Any]]:
        """The rows by step."""
        if self._rows is None:
            self._rows = self._read()
        return self._rows

    @rank_zero_only
    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """Nothing: the resolved config is written beside the file."""

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Add numbers to the row of ``step`` (a new row after the last one if None)."""
        step = max(self.experiment, default=-1) + 1 if step is None else step
        self.experiment.setdefault(step, {"step": step}).update(metrics)

    @rank_zero_only
    def save(self) -> None:
        """Write all rows."""
        rows = [self.experiment[step] for step in sorted(self.experiment)]
        names = dict.fromkeys(["epoch", "step", *sorted({name for row in rows for name in row})])
        with atomic_path(self._path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, names)
            writer.writeheader()
            writer.writerows(rows)

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """Write all rows, if there are any."""
        if self._rows:
            self.save()

    def _read(self) -> dict[int, dict[str, Any]]:
        if not self._path.exists():
            return {}
        with self._path.open(newline="", encoding="utf-8") as file:
            return {int(row["step"]): row for row in csv.DictReader(file)}


def define_axes(trainer: Trainer) -> None:
    """Tell Weights & Biases to plot everything under ``prune/`` against the number of parameters."""
    for logger in trainer.loggers:
        if isinstance(logger, WandbLogger):
            logger.experiment.define_metric("prune/params")
            logger.experiment.define_metric("prune/*", step_metric="prune/params")


def log_row(trainer: Trainer, row: Mapping[str, Any], step: int | None = None) -> None:
    """Send one row of the pruning history to every logger, in one call each.

    ``epoch``, ``params`` (a count), ``macs`` (a count), ``step`` (pruning steps executed) and the validation metric,
    if one is followed, under its own last name: ``val/accuracy`` arrives as ``prune/accuracy``. ``step`` is that of the
    epoch's own metrics unless given.
    """
    metrics = {f"prune/{key.rpartition('/')[2]}": value for key, value in row.items() if key != "epoch"}
    if step is None:
        step = max(trainer.global_step - 1, 0)  # Lightning's own epoch metrics carry the last step's number, counted from 0
    for logger in trainer.loggers:
        logger.log_metrics({**metrics, "epoch": row["epoch"]}, step=step)
        logger.save()


def logged_since(trainer: Trainer, before: Mapping[str, Any]) -> dict[str, Any]:
    """What was logged since ``trainer.callback_metrics`` was ``before``; Lightning keeps old values there for ever.

    By identity: a metric that is logged again is another tensor, also if its value is the same.
    """
    return {name: value for name, value in trainer.callback_metrics.items() if value is not before.get(name)}
