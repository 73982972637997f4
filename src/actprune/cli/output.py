"""The output folder of a job: everything that a later comparison, or a later use of the network, needs."""

from __future__ import annotations

import importlib.metadata
import platform
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lightning import LightningDataModule, LightningModule
from lightning.pytorch.loggers import Logger, WandbLogger
from omegaconf import DictConfig, OmegaConf
from rich.console import Console

from actprune.cli.console import print_folder
from actprune.cli.names import choice
from actprune.cli.recorder import RECORD, net_record, write_json
from actprune.cli.trained import fed
from actprune.core.files import atomic_path
from actprune.core.record import carry
from actprune.graph import trace
from actprune.pruning import Pruner
from actprune.report import before_after, params_vs_accuracy
from actprune.report import widths as draw_widths
from actprune.report.runs import SUMMARY
from actprune.surgery import save_pruned

CONFIG, CHECKPOINT = "config.yaml", "pruned.pt"
PICTURES = ("params_vs_accuracy.png", "widths.png")

NUMBERS = ("val_accuracy", "test_accuracy", "params_after", "macs_after", "params_left", "macs_left", "seconds")
"""Keys of the summary that a job may be judged by."""

_PACKAGES = ("actprune", "torch", "torchvision", "lightning", "torchmetrics", "hydra-core", "wandb")


@dataclass(frozen=True)
class Results:
    """What training and testing gave."""

    test_accuracy: float
    """Share of test samples that the last epoch's network gets right."""
    history: Sequence[dict[str, Any]]
    """One row per validation: epoch, step, params, val_accuracy."""
    epochs: int
    """How many were trained."""
    val_accuracy: float | None
    """The same of validation samples; None if nothing was validated."""
    seconds: float
    """Wall time from the first line of the job to the end of the test."""
    stopped: Mapping[str, str] = field(default_factory=dict)
    """Why pruning stopped: reason and message."""
    events: Sequence[dict[str, Any]] = ()
    """What every pruning step cut where, and what it took."""


def write_config(config: DictConfig, folder: Path) -> None:
    """Write the resolved configuration, before anything is built from it."""
    with atomic_path(folder / CONFIG) as temporary:
        OmegaConf.save(config, temporary)


def write(
    config: DictConfig,
    data: LightningDataModule,
    module: LightningModule,
    pruners: Mapping[str, Pruner],
    results: Results,
    loggers: Sequence[Logger],
) -> dict[str, Any]:
    """Write network, record, pictures and, last, the summary.

    Args:
        config: the resolved configuration.
        data: where validation images come from.
        module: the task, whose ``net`` is written.
        pruners: dotted name of a pruned network in the task -> its pruner; empty for a baseline.
        results: what training and testing gave.
        loggers: Weights & Biases among them gets summary and pictures.

    Returns:
        The summary, as it is in ``summary.json``.
    """
    folder, first = Path(config.paths.output_dir), next(iter(pruners.values()), None)
    summary = {
        **_sizes(data, module, list(pruners.values())),
        "test_accuracy": results.test_accuracy,
        "val_accuracy": results.val_accuracy,
        "seed": config.seed,
        "criterion": _criterion(first),
        "data": choice("data") or type(data).__name__,
        "model": choice("model") or type(module.net).__name__,
        "budget": None if first is None else {first.budget.unit: first.budget.share},
        "epochs": results.epochs,
        "seconds": round(results.seconds, 2),
        "versions": versions(),
        "commit": commit(),
        "history": list(results.history),
    }
    if pruners:
        record = net_record(pruners)
        summary["widths"] = [list(row) for pruner in pruners.values() for row in pruner.widths()]
        carry(module.get_submodule("net"), record)  # of all its pruned parts
        save_pruned(module.get_submodule("net"), folder / CHECKPOINT)
        write_json(record.to_dict(), folder / RECORD)
        summary["stopped"] = dict(results.stopped)
        summary["events"] = list(results.events)
    pictures = _draw(folder, summary)
    tell_wandb(loggers, summary, pictures)
    write_json(summary, folder / SUMMARY)
    return summary


def tell_wandb(loggers: Sequence[Logger], summary: Mapping[str, Any], pictures: Sequence[Path] = ()) -> None:
    """Send the numbers of the summary, and pictures, to Weights & Biases where it is among the loggers."""
    for logger in loggers:
        if isinstance(logger, WandbLogger):
            logger.experiment.summary.update({key: summary[key] for key in (*NUMBERS, "params_before", "macs_before")})
            for picture in pictures:
                logger.log_image(picture.stem, [str(picture)])


def show(summary: dict[str, Any], folder: Path, console: Console) -> None:
    """Print the before/after table and where everything is."""
    console.print(before_after(summary, [tuple(row) for row in summary.get("widths", ())]))
    print_folder(folder, console, f"{summary['epochs']} epochs in {summary['seconds']:.0f} s; ")


def _sizes(data: LightningDataModule, module: LightningModule, pruners: Sequence[Pruner]) -> dict[str, Any]:
    images, _ = next(iter(data.val_dataloader()))
    net = module.get_submodule("net")
    graph = trace(net, fed(net, images[:1]))
    after = {"params": graph.params, "macs": graph.macs}
    gone = {unit: sum(getattr(p, f"{unit}_before") - getattr(p, unit) for p in pruners) for unit in after}
    before = {unit: after[unit] + gone[unit] for unit in after}
    return {
        "params_before": before["params"],
        "params_after": after["params"],
        "params_left": after["params"] / before["params"],
        "macs_before": before["macs"],
        "macs_after": after["macs"],
        "macs_left": after["macs"] / before["macs"],
    }


def _criterion(pruner: Pruner | None) -> str:
    if pruner is None:
        return "none"
    return choice("pruner") or type(pruner.criterion).__name__.lower()


def _draw(folder: Path, summary: dict[str, Any]) -> list[Path]:
    pictures = [folder / name for name in PICTURES]
    params_vs_accuracy(summary["history"], pictures[0], summary["test_accuracy"])
    if "widths" not in summary:
        return pictures[:1]
    draw_widths([tuple(row) for row in summary["widths"]], pictures[1])
    return pictures


def versions() -> dict[str, str]:
    """Versions of Python and of what the numbers depend on."""
    return {"python": platform.python_version(), **{name: importlib.metadata.version(name) for name in _PACKAGES}}


def commit() -> str | None:
    """Commit of the source tree, with ``+`` where it has uncommitted changes; None outside a git checkout."""
    here = Path(__file__).parent

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(here), *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    try:
        commit = git("rev-parse", "HEAD")
        return f"{commit}+" if git("status", "--porcelain", "--untracked-files=no") else commit
    except (OSError, subprocess.CalledProcessError):
        return None
