"""``task=analyze``: what the groups of a network contribute, and which criterion sees it."""

from __future__ import annotations

import logging
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from lightning import LightningDataModule
from omegaconf import DictConfig
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from torch import nn

from actprune.cli import output
from actprune.cli.build import build
from actprune.cli.console import print_folder
from actprune.cli.names import choice
from actprune.cli.recorder import write_json
from actprune.cli.scoring import all_criteria, criteria_named, own_settings, print_own_settings
from actprune.cli.trained import drawn_samples, first_samples, load_network, ready_unaugmented
from actprune.compensation import Compensation
from actprune.core.errors import ConfigError
from actprune.pruning import EFFECT, Agreement, Influence, Removals, agreement, analyze
from actprune.report import draw_influence, influence_tables, write_influence
from actprune.report.runs import ANALYSIS
from actprune.statistics import check_positions

_LOG = logging.getLogger(__name__)

PIECES = "pieces"


@dataclass(frozen=True)
class Settings:
    """What ``conf/analyze`` says.

    Raises:
        ConfigError: ``images`` is below 1, or ``positions`` nothing that ``Pruner`` takes.
    """

    criteria: Sequence[str] | None
    """Files of ``conf/pruner``; None: all that score units."""
    images: int | None
    """Validation images on which effects are measured, drawn; None: all."""
    removals: Removals
    compensation: Compensation | None
    """None: criteria that read the second moments of one score nothing."""
    positions: int | Literal["auto"] | None
    """How many of each unit's positions in a sample criteria see; None: all."""

    def __post_init__(self) -> None:
        """Check before any work is done."""
        if self.images is not None and self.images < 1:
            raise ConfigError(f"images={self.images} must be at least 1, or null for all")
        check_positions(self.positions)


def analyze_network(config: DictConfig, data: LightningDataModule, net: nn.Module) -> tuple[Influence, Agreement]:
    """Load the network, analyze it, and write tables, pictures and ``analysis.json``.

    Raises:
        ActPruneError: weights or data are missing, a criterion does not exist or cannot score this network.
    """
    began = time.monotonic()
    settings: Settings = build(config.analyze, "analyze")
    names = all_criteria() if settings.criteria is None else settings.criteria
    criteria = criteria_named(names, config, "analyze.criteria")
    if config.weights is not None:
        load_network(net, config.weights)
    elif config.model.get("weights") is None:
        _LOG.warning("weights=null: this network has learned nothing, and nor have its units; give weights=FILE")
    ready_unaugmented(data)
    observed = first_samples(data.train_dataloader(), config.calibration)
    folder = Path(config.paths.output_dir)
    with _shown() as progress:
        influence = analyze(
            net,
            observed[0][0][:1],
            observed,
            drawn_samples(data.val_dataloader(), settings.images, config.seed),
            criteria=criteria,
            removals=settings.removals,
            compensation=settings.compensation,
            positions=settings.positions,
            folder=folder / PIECES,
            progress=progress,
        )
    agreed = agreement(influence, config.seed)
    write_influence(influence, agreed, folder)
    draw_influence(influence, agreed, folder)
    seconds = influence.seconds_before + time.monotonic() - began
    write_json(_summary(config, influence, agreed, seconds), folder / ANALYSIS)
    return influence, agreed


def show(config: DictConfig, influence: Influence, agreed: Agreement, console: Console) -> None:
    """Print the tables, settings of criteria that are not those of their files, and where everything is."""
    console.print(influence_tables(influence, agreed))
    print_own_settings(config, console)
    print_folder(config.paths.output_dir, console)


def _row(agreed: Agreement, k: int) -> dict[str, float | None]:
    """One criterion's agreement with the effect; None where no group can tell."""
    effect = list(agreed.names).index(EFFECT)
    parts = {"spearman": agreed.mean, "low": agreed.low, "high": agreed.high, "groups": agreed.n_groups}
    return {key: _known(matrix[effect][k]) for key, matrix in parts.items()}


def _known(value: float) -> float | None:
    return None if math.isnan(value) else value


@contextmanager
def _shown() -> Iterator[Callable[[int, int, str], None]]:
    """A bar on a terminal, a line per group in a file or a pipe."""
    if not sys.stdout.isatty():
        yield lambda done, total, name: print(f"{done}/{total} {name}", flush=True)
        return
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, transient=True) as bar:
        task = bar.add_task("", total=None)
        yield lambda done, total, name: bar.update(task, completed=done, total=total, description=name)


def _summary(config: DictConfig, influence: Influence, agreed: Agreement, seconds: float) -> dict[str, Any]:
    return {
        "params": influence.params,
        "macs": influence.macs,
        "val_loss": influence.loss,
        "val_accuracy": influence.accuracy,
        "observed": influence.n_observed,
        "measured": influence.n_measured,
        "measured_alone": max((group.n_alone for group in influence.groups), default=0),
        "groups": len(influence.groups),
        "halves": _known(agreed.halves),
        "ceiling": _known(agreed.ceiling),
        "settings": own_settings(config),
        "effect": {name: _row(agreed, k) for k, name in enumerate(agreed.names) if name != EFFECT},
        "seed": config.seed,
        "weights": config.weights,
        "data": choice("data"),
        "model": choice("model"),
        "seconds": round(seconds, 2),
        "versions": output.versions(),
        "commit": output.commit(),
    }
