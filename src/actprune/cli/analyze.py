"""``task=analyze``: what the groups of a network contribute, and which criterion sees it."""

from __future__ import annotations

import logging
import math
import pickle
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from hydra.core.global_hydra import GlobalHydra
from hydra.core.object_type import ObjectType
from lightning import LightningDataModule
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from torch import nn

from actprune.cli import output
from actprune.cli.build import build, resolved
from actprune.cli.names import choice
from actprune.cli.recorder import write_json
from actprune.compensation import Compensation
from actprune.core.errors import ConfigError
from actprune.core.record import SurgeryRecord
from actprune.core.views import Criterion
from actprune.models.weights import load_weights
from actprune.pruning import EFFECT, Agreement, Influence, Removals, agreement, analyze
from actprune.report import draw_influence, influence_tables, write_influence
from actprune.surgery import apply_record, load_pruned
from actprune.training.resume import KEY

_LOG = logging.getLogger(__name__)

ANALYSIS = "analysis.json"
PIECES = "pieces"


@dataclass(frozen=True)
class Settings:
    """What ``conf/analyze`` says.

    Raises:
        ConfigError: ``images`` is below 1.
    """

    criteria: Sequence[str] | None
    """Files of ``conf/pruner``; None: all that score units."""
    images: int | None
    """Validation images on which effects are measured; None: all."""
    removals: Removals
    compensation: Compensation

    def __post_init__(self) -> None:
        """Check before any work is done."""
        if self.images is not None and self.images < 1:
            raise ConfigError(f"images={self.images} must be at least 1, or null for all")


def analyze_network(config: DictConfig, data: LightningDataModule, net: nn.Module) -> tuple[Influence, Agreement]:
    """Load the network, analyze it, and write tables, pictures and ``analysis.json``.

    Raises:
        ActPruneError: weights or data are missing, a criterion does not exist or cannot score this network.
    """
    began = time.monotonic()
    settings: Settings = build(config.analyze, "analyze")
    if config.calibration < 1:
        raise ConfigError(f"calibration={config.calibration} must be at least 1 image")
    names = _all() if settings.criteria is None else settings.criteria
    criteria = {name: criterion_named(name, config, "analyze.criteria") for name in names}
    if config.weights is not None:
        load_network(net, config.weights)
    elif config.model.get("weights") is None:
        _LOG.warning("weights=null: this network has learned nothing, and nor have its units; give weights=FILE")
    data.prepare_data()
    data.setup("fit")
    observed = first_samples(data.train_dataloader(), config.calibration)
    folder = Path(config.paths.output_dir)
    with _shown() as progress:
        influence = analyze(
            net,
            observed[0][0][:1],
            observed,
            first_samples(data.val_dataloader(), settings.images),
            criteria=criteria,
            removals=settings.removals,
            compensation=settings.compensation,
            folder=folder / PIECES,
            progress=progress,
        )
    agreed = agreement(influence, config.seed)
    write_influence(influence, agreed, folder)
    draw_influence(influence, agreed, folder)
    write_json(_summary(config, influence, agreed, time.monotonic() - began), folder / ANALYSIS)
    return influence, agreed


def show(influence: Influence, agreed: Agreement, folder: Path, console: Console) -> None:
    """Print the tables and where everything is."""
    console.print(influence_tables(influence, agreed))
    console.print("everything is in", soft_wrap=True)
    console.print(str(folder), soft_wrap=True, highlight=False)


def load_network(net: nn.Module, path: str) -> None:
    """Load weights, a checkpoint of a run, or a pruned network, into a network of the original shape, in place.

    Raises:
        ConfigError: the file is missing, is none of these, or does not fit.
        SurgeryError: the network is not the one that was pruned.
    """
    content = read_network(path)
    if isinstance(content, dict) and "surgery_record" in content:
        load_pruned(net, path)
        return
    if isinstance(content, dict) and "net" in content.get(KEY, {}):
        apply_record(net, SurgeryRecord.from_dict(content[KEY]["net"]))
    load_weights(net, path)


def read_network(path: str) -> Any:
    """What a file holds; None where it cannot be read, which ``load_weights`` tells of."""
    with suppress(OSError, pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError):
        return torch.load(path, map_location="cpu", weights_only=True)
    return None


def _all() -> list[str]:
    """Every file of the pruner folder that holds a criterion."""
    names = GlobalHydra.instance().config_loader().get_group_options("pruner", ObjectType.CONFIG)
    return [name for name in names if not name.startswith("_") and "criterion" in _file(name)]


def criterion_named(name: str, config: DictConfig, key: str) -> Criterion:
    """The criterion of a file of ``conf/pruner``, with the settings that the configuration gives it.

    Raises:
        ConfigError: there is no such file, or it has no criterion; the message begins with ``key``, where it was asked for.
    """
    if name not in GlobalHydra.instance().config_loader().get_group_options("pruner", ObjectType.CONFIG):
        raise ConfigError(f"{key}: there is no pruner={name}; choose from {', '.join(_all())}")
    node = _file(name).get("criterion")
    if node is None:
        raise ConfigError(f"{key}: pruner={name} has no criterion; choose from {', '.join(_all())}")
    # what the file takes from other places of the configuration is found there
    known: Any = OmegaConf.to_container(config, enum_to_str=True)
    whole = OmegaConf.create({**known, "asked": node})
    return build(resolved(whole).asked, f"pruner.{name}.criterion")


def _file(name: str) -> DictConfig:
    """A file of the pruner folder as it is written, wherever on Hydra's search path."""
    found = GlobalHydra.instance().config_loader().repository.load_config(f"pruner/{name}")  # type: ignore[attr-defined]
    return found.config


def _row(agreed: Agreement, k: int) -> dict[str, float | None]:
    """One criterion's agreement with the effect; None where no group can tell."""
    effect = list(agreed.names).index(EFFECT)
    parts = {"spearman": agreed.mean, "low": agreed.low, "high": agreed.high, "groups": agreed.n_groups}
    return {key: None if math.isnan(matrix[effect][k]) else matrix[effect][k] for key, matrix in parts.items()}


def first_samples(loader: Any, n: int | None) -> list[Any]:
    """The first n samples of a loader, in batches of images and labels; all where n is None."""
    if n is None:
        return [(images, labels) for images, labels in loader]
    batches = [(images, labels) for images, labels in islice(loader, -(-n // loader.batch_size))]
    images, labels = batches[-1]
    left = n - sum(len(y) for _, y in batches[:-1])
    batches[-1] = (images[:left], labels[:left])
    return batches


@contextmanager
def _shown() -> Iterator[Callable[[int, int, str], None]]:
    """A bar on a terminal, a line per group in a file or a pipe."""
    if not sys.stdout.isatty():
        yield lambda done, total, name: print(f"{done}/{total} {name}", flush=True)
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
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
        "groups": len(influence.groups),
        "effect": {name: _row(agreed, k) for k, name in enumerate(agreed.names) if name != EFFECT},
        "seed": config.seed,
        "weights": config.weights,
        "data": choice("data"),
        "model": choice("model"),
        "seconds": round(seconds, 2),
        "versions": output.versions(),
        "commit": output.commit(),
    }
