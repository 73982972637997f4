"""``task=prune``: prune a trained network without training it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning import LightningDataModule
from omegaconf import DictConfig
from rich.console import Console
from torch import nn

from actprune.cli import output
from actprune.cli.console import print_folder
from actprune.cli.names import choice
from actprune.cli.recorder import RECORD, write_json
from actprune.cli.trained import accuracy, first_samples, ready_unaugmented
from actprune.core.errors import ConfigError
from actprune.models.weights import load_weights
from actprune.pruning import PostTraining, prune_trained
from actprune.report import before_after
from actprune.report.runs import SUMMARY
from actprune.surgery import save_pruned
from actprune.training import PruningCallback


def prune_network(
    config: DictConfig, data: LightningDataModule, net: nn.Module, pruning: PruningCallback | None
) -> dict[str, Any]:
    """Load weights, observe calibration images, cut, compensate, measure and write.

    Returns:
        The summary, as it is in ``summary.json``.

    Raises:
        ActPruneError: weights or data are missing, or the network cannot be pruned as asked.
    """
    if pruning is None:
        raise ConfigError("task=prune has nothing to prune with pruner=none; choose a criterion, e.g. pruner=reconstruction")
    if config.weights is not None:
        load_weights(net, config.weights)
    ready_unaugmented(data)
    batches = first_samples(data.train_dataloader(), config.calibration)
    test = data.test_dataloader()
    done = prune_trained(
        net,
        batches[0][0][:1],
        batches,
        criterion=pruning.criterion,
        budget=pruning.budget,
        evaluate=lambda model: accuracy(model, test),
        selection=pruning.selection,
        compensation=pruning.compensation,
        seed=config.seed,
        positions=pruning.positions,
    )
    summary = _summary(config, done)
    summary["val_accuracy"] = accuracy(net.eval(), data.val_dataloader())
    net.cpu()  # what is kept and exported is for any machine
    folder = Path(config.paths.output_dir)
    save_pruned(net, folder / output.CHECKPOINT)
    write_json(done.record.to_dict(), folder / RECORD)
    write_json(summary, folder / SUMMARY)
    return summary


def show(summary: dict[str, Any], folder: Path, console: Console) -> None:
    """Print what was measured and where everything is."""
    console.print(before_after(summary, [tuple(row) for row in summary["widths"]]))
    console.print(
        f"test accuracy {summary['test_accuracy_before']:.2%} before, {summary['test_accuracy_cut']:.2%} as cut, "
        f"{summary['test_accuracy']:.2%} compensated; {summary['seconds']:.1f} s without evaluations"
    )
    for size, (before, after) in summary["latency_ms"].items():
        console.print(f"batch of {size}: {before:.2f} ms before, {after:.2f} ms after")
    print_folder(folder, console)


def _summary(config: DictConfig, done: PostTraining) -> dict[str, Any]:
    return {
        "params_before": done.params[0],
        "params_after": done.params[1],
        "params_left": done.params[1] / done.params[0],
        "macs_before": done.macs[0],
        "macs_after": done.macs[1],
        "macs_left": done.macs[1] / done.macs[0],
        "test_accuracy_before": done.score_before,
        "test_accuracy_cut": done.score_cut,
        "test_accuracy": done.score_after,
        "latency_ms": {str(size): list(pair) for size, pair in done.latency.items()},
        "seconds": round(done.seconds, 2),
        "calibration": config.calibration,
        "seed": config.seed,
        "criterion": choice("pruner"),
        "compensation": None if config.compensation is None else config.compensation._target_.rpartition(".")[2],
        "data": choice("data"),
        "model": choice("model"),
        "budget": {unit: share for unit, share in config.budget.items() if share is not None},
        "widths": [[name, *pair] for name, pair in done.record.widths.items()],
        "versions": output.versions(),
        "commit": output.commit(),
    }
