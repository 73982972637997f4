"""``task=capacity``: a trained network against its initialisation, before and after pruning."""

import csv
import json

import pytest
import torch

from actprune.cli.build import build, resolved
from actprune.cli.job import run_job
from actprune.core.errors import ConfigError
from actprune.report import CAPACITY_TABLES

TASK = ("task=capacity", "logger=none", "calibration=64", "capacity.criteria=[magnitude,random]")


@pytest.fixture
def config(searching_config):
    return searching_config


@pytest.fixture
def weights(config, tmp_path):
    torch.manual_seed(7)
    net = build(resolved(config()).model, "model")
    path = tmp_path / "elsewhere" / "weights.pt"
    path.parent.mkdir()
    torch.save(net.state_dict(), path)
    return path


def rows(path):
    with path.open() as file:
        return list(csv.DictReader(file))


def test_it_measures_writes_and_prints(config, weights, tmp_path, capsys):
    assert run_job(config(*TASK, f"weights={weights}", "capacity.quantile=0.9")) is None
    out = tmp_path / "out"
    assert {path.name for path in out.iterdir()} == {"config.yaml", "capacity.json", *CAPACITY_TABLES}
    found = json.loads((out / "capacity.json").read_text())
    names = [network["network"] for network in found["networks"]]
    assert names == ["as loaded", "magnitude", "random"]
    before, *after = found["networks"]
    assert all(network["params"] <= 0.35 * before["params"] for network in after)
    assert [layer["layer"] for layer in before["layers"]] == [row["layer"] for row in rows(out / "layers.csv")][:7]
    assert before["n_samples"] == 1078
    assert {"seed", "weights", "budget", "compensation", "versions", "commit", "seconds"} <= found.keys()
    printed = capsys.readouterr().out
    assert max(map(len, printed.splitlines())) <= 110
    assert "capacity of the whole network" in printed
    assert str(out) in printed


def test_the_initialisation_is_that_of_the_run(fast, config, tmp_path):
    """A run that learns nothing leaves its weights where they were drawn; only batch norms have seen data."""
    run_job(fast("pruner=none", "logger=none", "optimizer=sgd", "optimizer.lr=0", "seed=5"))
    checkpoint = tmp_path / "out" / "checkpoints" / "last.ckpt"
    here = f"paths.output_dir={tmp_path / 'capacity'}"
    run_job(config(*TASK, f"weights={checkpoint}", "seed=5", "capacity.criteria=[]", here))
    layers = {row["layer"]: row for row in rows(tmp_path / "capacity" / "layers.csv")}
    assert float(layers["linear"]["distance"]) == 0
    assert float(layers["conv"]["distance"]) > 0
    with pytest.raises(ConfigError, match=r"are of a run with seed=5, the initialisation here is that of seed=6"):
        run_job(config(*TASK, f"weights={checkpoint}", "seed=6", here))


def test_a_pruned_network_is_measured_against_its_own_part(fast, config, tmp_path):
    run_job(fast("pruner=magnitude", "logger=none", "budget.params=0.5"))
    here = f"paths.output_dir={tmp_path / 'capacity'}"
    run_job(config(*TASK, f"weights={tmp_path / 'out' / 'pruned.pt'}", "capacity.criteria=[]", here))
    (network,) = json.loads((tmp_path / "capacity" / "capacity.json").read_text())["networks"]
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert network["params"] == summary["params_after"]
    assert sum(layer["weights"] for layer in network["layers"]) < network["params"]
    assert all(layer["distance"] > 0 for layer in network["layers"])


def test_a_run_under_limits_is_measured_against_what_it_kept_to(fast, config, tmp_path):
    limits = ["callbacks=constrained", "callbacks.capacity.lipschitz=0.5", "callbacks.capacity.distance=0.5"]
    run_job(fast("pruner=none", "logger=none", "model=mlp", *limits))
    here = f"paths.output_dir={tmp_path / 'capacity'}"
    run_job(
        config(*TASK, "model=mlp", f"weights={tmp_path / 'out' / 'checkpoints' / 'last.ckpt'}", "capacity.criteria=[]", here)
    )
    layers = rows(tmp_path / "capacity" / "layers.csv")
    assert len(layers) == 3
    for layer in layers:
        assert float(layer["lipschitz"]) <= 0.5 * 1.003
        assert float(layer["distance"]) <= 0.5 * 1.001


def test_an_initialisation_from_a_file(config, weights, tmp_path):
    run_job(config(*TASK, f"weights={weights}", f"capacity.initial={weights}", "capacity.criteria=[]"))
    assert {float(row["distance"]) for row in rows(tmp_path / "out" / "layers.csv")} == {0.0}


def test_an_untrained_network_is_told_of(config, caplog):
    run_job(config(*TASK, "capacity.criteria=[]"))
    assert "every distance is 0" in caplog.text


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("weights=absent.pt", "absent.pt does not exist"),
        ("capacity.initial=absent.pt", "absent.pt does not exist"),
        ("capacity.quantile=1", r"quantile=1\S* must be in \[0, 1\)"),
        ("capacity.criteria=[rns]", "capacity.criteria: there is no pruner=rns"),
        ("calibration=0", "calibration=0 must be at least 1 image"),
        ("pruner=none", "pruner=none has no budget to prune to"),
    ],
)
def test_what_cannot_work_says_so(config, override, message):
    with pytest.raises(ConfigError, match=message):
        run_job(config(*TASK, override))


def test_networks_without_a_constant_are_refused_by_name(config):
    from actprune.core.errors import TraceError

    with pytest.raises(TraceError, match="native_layer_norm in .* has no Lipschitz constant"):
        run_job(config(*TASK, "model=vit_tiny", "data.image_size=32", "capacity.criteria=[]"))


def test_training_images_are_observed_as_they_are(config, weights, observed_by, training_images):
    seen = observed_by("actprune.cli.capacity.prune_trained", config(*TASK, f"weights={weights}", "data.augment=true"))
    assert len(seen) == 64
    assert torch.cdist(seen.flatten(1), training_images.flatten(1)).min(1).values.max() < 1e-3
