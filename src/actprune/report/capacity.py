"""Tables of a capacity measurement: for the console (at most 100 columns), as CSV and as plain values for JSON."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from actprune.capacity import LayerCapacity, NetworkCapacity, Sample, layer_capacities, norms_bound, params_bound
from actprune.report.sheet import write_rows
from actprune.report.text import count, percent

CAPACITY_TABLES = ("networks.csv", "layers.csv")
LAYERS, ACROSS = 24, 6
"""Layers and networks of the layer tables on the console; the first network and the last layers are among them."""

_LEGEND = (
    "Lipschitz: bound of the whole network by composition. Distance: sum over layers of the (2, 1) distance to initialisation. "
    "Complexity: (sum over layers of (what surrounds it x its distance)^(2/3))^(3/2). Margin: right output minus the largest "
    "other, at the asked quantile of training images. Capacity: complexity x 4 ||X|| / (sqrt(n) margin). Bound: the smaller of "
    "the two of Rademacher complexity; above 1 it says nothing. None: the margin is not above 0."
)


@dataclass(frozen=True)
class Measured:
    """One network."""

    name: str
    """``as loaded``, or the criterion by which it was pruned."""
    network: NetworkCapacity
    sample: Sample
    params: int
    """All parameters of the network."""
    test_accuracy: float
    """Share of test samples that are right."""

    @property
    def capacity(self) -> float:
        """(sum of C_i^(2/3))^(3/2); infinite where the margin is not positive."""
        return sum(c ** (2 / 3) for c in layer_capacities(self.network, self.sample)) ** 1.5

    @property
    def bounds(self) -> tuple[float, float]:
        """The norms bound and the params bound."""
        sizes = [layer.params for layer in self.network.layers]
        capacities = layer_capacities(self.network, self.sample)
        return norms_bound(capacities, self.sample.n, max(sizes)), params_bound(capacities, self.sample.n, sizes)


def capacity_tables(measured: Sequence[Measured]) -> RenderableType:
    """Show whole-network and layer-wise capacity of networks with the same layers, the unpruned one first."""
    shown = measured[:ACROSS]
    parts: list[RenderableType] = [_networks(measured), Text(_LEGEND, style="dim"), Text()]
    parts.append(_layers("Lipschitz constant of every layer", shown, lambda layer: layer.lipschitz))
    parts.append(_layers("(2, 1) distance of every layer to its initialisation", shown, lambda layer: layer.distance))
    if len(measured) > ACROSS:
        parts.append(Text(f"{len(measured) - ACROSS} more networks are in {CAPACITY_TABLES[1]}", style="dim"))
    return Group(*parts)


def write_capacity(measured: Sequence[Measured], folder: str | os.PathLike[str]) -> list[Path]:
    """Write ``CAPACITY_TABLES`` in full precision: one row per network, one per network and layer; no value where infinite."""
    paths = [Path(folder) / name for name in CAPACITY_TABLES]
    write_rows(paths[0], [network_row(one) for one in measured])
    write_rows(paths[1], [{"network": one.name, **row} for one in measured for row in layer_rows(one)])
    return paths


def network_row(one: Measured) -> dict[str, Any]:
    """Everything about a network as a whole; None where infinite."""
    norms, params = one.bounds
    return {
        "network": one.name,
        "params": one.params,
        "test_accuracy": one.test_accuracy,
        "train_accuracy": one.sample.accuracy,
        "lipschitz": one.network.lipschitz,
        "distance": one.network.distance,
        "complexity": one.network.complexity,
        "margin": one.sample.margin,
        "input_norm": one.sample.norm,
        "n_samples": one.sample.n,
        "capacity": _finite(one.capacity),
        "norms_bound": _finite(norms),
        "params_bound": _finite(params),
    }


def layer_rows(one: Measured) -> list[dict[str, Any]]:
    """Everything about a network's layers, in order of execution; None where infinite."""
    capacities = layer_capacities(one.network, one.sample)
    return [
        {
            "layer": layer.name,
            "batch_norm": layer.batch_norm,
            "weights": layer.params,
            "lipschitz": layer.lipschitz,
            "distance": layer.distance,
            "before": layer.before,
            "after": layer.after,
            "capacity": _finite(capacity),
        }
        for layer, capacity in zip(one.network.layers, capacities, strict=True)
    ]


def _networks(measured: Sequence[Measured]) -> Table:
    names = ("params", "accuracy", "Lipschitz", "distance", "complexity", "margin", "capacity", "bound")
    table = _table("capacity of the whole network", "network", *names)
    for one in measured:
        table.add_row(
            Text(one.name),
            count(one.params),
            percent(one.test_accuracy, 2),
            _short(one.network.lipschitz),
            _short(one.network.distance),
            _short(one.network.complexity),
            _short(one.sample.margin),
            _short(one.capacity),
            _short(min(one.bounds)),
        )
    return table


def _layers(title: str, measured: Sequence[Measured], value: Any) -> Table:
    table = _table(title, "layer", *(one.name for one in measured))
    names = list(dict.fromkeys(layer.name for one in measured for layer in one.network.layers))
    half = LAYERS // 2
    shown = names if len(names) <= LAYERS else [*names[:half], None, *names[-half:]]
    known: list[dict[str, LayerCapacity]] = [{layer.name: layer for layer in one.network.layers} for one in measured]
    for name in shown:
        if name is None:
            table.add_row(f"… {len(names) - LAYERS} more", style="dim")
            continue
        table.add_row(Text(name), *(_short(value(layers[name])) if name in layers else "-" for layers in known))
    return table


def _table(title: str, first: str, *others: str) -> Table:
    table = Table(
        box=box.SIMPLE_HEAD, title=Text(title, style="bold"), title_justify="left", pad_edge=False, padding=(0, 1, 0, 0)
    )
    table.add_column(first, overflow="fold", max_width=26)
    for name in others:
        table.add_column(Text(name), justify="right", overflow="ellipsis", no_wrap=True)
    return table


def _short(value: float) -> str:
    """Three digits or more, so that a column can be compared."""
    if math.isinf(value):
        return "none"
    size = abs(value)
    return f"{value:.2e}" if size >= 1e5 else f"{value:,.{2 if size < 10 else 1 if size < 100 else 0}f}"


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
