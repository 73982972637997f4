"""``task=capacity``: Lipschitz constants and distances to initialisation of a trained network, before and after pruning it."""

from __future__ import annotations

import copy
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning import LightningDataModule
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from torch import nn

from actprune.capacity import measure, sample_of
from actprune.cli import output
from actprune.cli.build import build
from actprune.cli.console import print_folder
from actprune.cli.names import choice
from actprune.cli.recorder import write_json
from actprune.cli.scoring import criteria_named, own_settings, print_own_settings
from actprune.cli.trained import accuracy, first_samples, load_network, read_network, ready_unaugmented
from actprune.core.calling import evaluating
from actprune.core.errors import ConfigError
from actprune.core.record import record_of
from actprune.models.weights import load_weights
from actprune.pruning import prune_trained
from actprune.report import Measured, capacity_tables, layer_rows, network_row, write_capacity
from actprune.report.runs import CAPACITY
from actprune.surgery import apply_record
from actprune.training import PruningCallback
from actprune.training.constraining import initial_weights

_LOG = logging.getLogger(__name__)

LOADED = "as loaded"


@dataclass(frozen=True)
class Settings:
    """What ``conf/capacity`` says.

    Raises:
        ConfigError: quantile is not in [0, 1).
    """

    criteria: Sequence[str]
    """Files of ``conf/pruner``; the network is pruned by each of them, without training."""
    quantile: float
    """Share of training images whose margin may be below the one that the bounds take; 0 is the smallest margin."""
    initial: str | None
    """File of the weights at initialisation; None: those that ``seed`` draws."""

    def __post_init__(self) -> None:
        """Check before any work is done."""
        if not 0 <= self.quantile < 1:
            raise ConfigError(f"quantile={self.quantile} must be in [0, 1); 0 is the smallest margin")


def measure_networks(
    config: DictConfig, data: LightningDataModule, net: nn.Module, pruning: PruningCallback | None
) -> list[Measured]:
    """Load a network, measure it as it is and after pruning by every criterion, and write tables and ``capacity.json``.

    Raises:
        ActPruneError: weights or data are missing, a criterion does not exist, or the network has no Lipschitz constant.
    """
    began = time.monotonic()
    settings: Settings = build(config.capacity, "capacity")
    criteria = criteria_named(settings.criteria, config, "capacity.criteria")
    if criteria and pruning is None:
        raise ConfigError("pruner=none has no budget to prune to; choose any pruner, or capacity.criteria=[] to measure only")
    initial = _initial(config, settings, net)
    if config.weights is not None:
        load_network(net, config.weights)
    else:
        _LOG.warning("weights=null: this network is as it was initialised, and every distance is 0; give weights=FILE")
    ready_unaugmented(data)
    measured = [_measured(LOADED, net, initial, data, settings)]
    for name, criterion in criteria.items():
        assert pruning is not None
        pruned = copy.deepcopy(net)
        batches = first_samples(data.train_dataloader(), config.calibration)
        prune_trained(
            pruned,
            batches[0][0][:1],
            batches,
            criterion=criterion,
            budget=pruning.budget,
            evaluate=lambda model: 0.0,
            selection=pruning.selection,
            compensation=pruning.compensation,
            seed=config.seed,
            positions=pruning.positions,
        )
        measured.append(_measured(name, pruned, initial, data, settings))
    folder = Path(config.paths.output_dir)
    write_capacity(measured, folder)
    write_json(_summary(config, measured, time.monotonic() - began), folder / CAPACITY)
    return measured


def show(config: DictConfig, measured: Sequence[Measured], console: Console) -> None:
    """Print the tables, settings of criteria that are not those of their files, and where everything is."""
    console.print(capacity_tables(measured))
    print_own_settings(config, console)
    print_folder(config.paths.output_dir, console)


def _initial(config: DictConfig, settings: Settings, net: nn.Module) -> nn.Module:
    """The network as it was before training, of the original shape.

    Raises:
        ConfigError: the weights were trained from another seed's initialisation, or the file does not fit.
    """
    initial = copy.deepcopy(net)
    if settings.initial is not None:
        load_weights(initial, settings.initial)
        return initial
    if config.weights is None:
        return initial
    for folder in Path(config.weights).resolve().parents[:2]:
        written = folder / output.CONFIG
        seed = OmegaConf.select(OmegaConf.load(written), "seed") if written.is_file() else None
        if seed is not None and seed != config.seed:
            raise ConfigError(
                f"weights={config.weights} are of a run with seed={seed}, the initialisation here is that of "
                f"seed={config.seed}; set seed={seed}, or capacity.initial=FILE"
            )
    # a run under limits keeps to its first weights as they were scaled to the limit
    for path, weight in initial_weights(read_network(config.weights)).items():
        initial.get_parameter(f"{path.removeprefix('net.')}.weight").data.copy_(weight)
    return initial


def _measured(name: str, net: nn.Module, initial: nn.Module, data: LightningDataModule, settings: Settings) -> Measured:
    twin = copy.deepcopy(initial)
    if record_of(net):
        apply_record(twin, record_of(net))
    images, _ = next(iter(data.val_dataloader()))
    with evaluating(net):
        right = accuracy(net, data.test_dataloader())
    return Measured(
        name,
        measure(net, twin, images[:1]),
        sample_of(net, data.train_dataloader(), settings.quantile),
        sum(p.numel() for p in net.parameters()),
        right,
    )


def _summary(config: DictConfig, measured: Sequence[Measured], seconds: float) -> dict[str, Any]:
    return {
        "networks": [{**network_row(one), "layers": layer_rows(one)} for one in measured],
        "settings": own_settings(config),
        "quantile": config.capacity.quantile,
        "calibration": config.calibration,
        "budget": {unit: share for unit, share in config.budget.items() if share is not None},
        "compensation": None if config.compensation is None else config.compensation._target_.rpartition(".")[2],
        "seed": config.seed,
        "weights": config.weights,
        "initial": config.capacity.initial,
        "data": choice("data"),
        "model": choice("model"),
        "seconds": round(seconds, 2),
        "versions": output.versions(),
        "commit": output.commit(),
    }
