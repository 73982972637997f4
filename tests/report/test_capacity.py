import csv
import io
import math

import pytest
from rich.console import Console

from actprune.capacity import LayerCapacity, NetworkCapacity, Sample
from actprune.report import CAPACITY_TABLES, Measured, capacity_tables, layer_rows, network_row, write_capacity
from actprune.report.capacity import ACROSS, LAYERS


def made(name="as loaded", layers=3, margin=0.5, scale=1.0):
    parts = tuple(
        LayerCapacity(f"stages.{i}.conv", None, 2.0 * scale, 1.0 + i, 100, 2.0**i, 2.0 ** (layers - 1 - i))
        for i in range(layers)
    )
    return Measured(name, NetworkCapacity(parts, (2.0 * scale) ** layers), Sample(1000, 8.0, margin, 0.99), 1234, 0.98)


def printed(measured):
    console = Console(width=100, file=io.StringIO())
    console.print(capacity_tables(measured))
    return console.file.getvalue()


def test_capacity_is_complexity_over_the_margin():
    one = made()
    assert one.capacity == pytest.approx(one.network.complexity * 4 * 8 / 0.5)
    norms, params = one.bounds
    assert 0 < min(norms, params) < math.inf


def test_the_console_shows_every_network_and_layer_within_100_columns():
    text = printed([made(), made("entropy", scale=0.5), made("label_information")])
    assert max(map(len, text.splitlines())) <= 100
    for word in ("as loaded", "entropy", "label_information", "stages.2.conv", "98.00 %", "1,234"):
        assert word in text


def test_many_layers_and_networks_are_shortened():
    text = printed([made(str(i), layers=LAYERS + 5) for i in range(ACROSS + 2)])
    assert "… 5 more" in text
    assert "2 more networks are in layers.csv" in text
    assert max(map(len, text.splitlines())) <= 100


def test_files_have_everything(tmp_path):
    measured = [made(), made("entropy")]
    paths = write_capacity(measured, tmp_path)
    assert tuple(path.name for path in paths) == CAPACITY_TABLES
    with paths[0].open() as file:
        networks = list(csv.DictReader(file))
    with paths[1].open() as file:
        layers = list(csv.DictReader(file))
    assert [row["network"] for row in networks] == ["as loaded", "entropy"]
    assert float(networks[0]["capacity"]) == measured[0].capacity
    assert len(layers) == 6
    assert float(layers[2]["distance"]) == 3.0


def test_without_a_margin_there_is_no_value(tmp_path):
    one = made(margin=-0.1)
    assert network_row(one)["capacity"] is None
    assert network_row(one)["params_bound"] is None
    assert {row["capacity"] for row in layer_rows(one)} == {None}
    assert "none" in printed([one])
