"""``task=prune``: a trained network is pruned without training, measured, and written."""

import json

import pytest
import torch
import wandb

from actprune.cli.build import build, resolved
from actprune.cli.job import run_job
from actprune.cli.output import NUMBERS
from actprune.core.errors import ConfigError
from actprune.surgery import load_pruned

TASK = (
    "task=prune",
    "pruner=reconstruction",
    "budget.params=0.5",
    "logger=none",
    "calibration=100",
)


@pytest.fixture
def weights(config, tmp_path):
    """Random weights will do: what is asked is that they are the ones that are pruned."""
    torch.manual_seed(7)
    net = build(resolved(config()).model, "model")
    path = tmp_path / "weights.pt"
    torch.save(net.state_dict(), path)
    return path


def test_weights_and_biases_get_the_numbers(config, weights, tmp_path, monkeypatch):
    """The run is the stand-in that wandb itself has for a switched-off one; its summary is what was written."""
    monkeypatch.setenv("WANDB_MODE", "disabled")
    seen = []
    monkeypatch.setattr("actprune.cli.wandb.finish", lambda: seen.append(dict(wandb.run.summary)))
    run_job(config(*TASK, "logger=wandb", f"weights={weights}"))
    wandb.finish()
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert {key: summary[key] for key in NUMBERS}.items() <= seen[0].items()


def test_it_loads_prunes_measures_and_writes(config, weights, tmp_path, capsys):
    settings = config(*TASK, f"weights={weights}", "seed=3", "optimize=test_accuracy")
    score = run_job(settings)
    out = tmp_path / "out"
    assert {path.name for path in out.iterdir()} == {"config.yaml", "summary.json", "pruned.pt", "surgery_record.json"}
    summary = json.loads((out / "summary.json").read_text())
    assert summary["test_accuracy"] == score
    assert summary["params_after"] <= 0.5 * summary["params_before"]
    assert summary["budget"] == {"params": 0.5}
    assert summary["calibration"] == 100
    assert summary["compensation"] == "LeastSquares"
    assert set(summary["latency_ms"]) == {"1", "64"}
    assert {"test_accuracy_before", "test_accuracy_cut", "val_accuracy", "seconds", "commit"} <= summary.keys()
    printed = capsys.readouterr().out
    assert "as cut" in printed
    assert "batch of 64" in printed
    fresh = build(resolved(settings).model, "model")
    load_pruned(fresh, out / "pruned.pt")
    assert sum(p.numel() for p in fresh.parameters()) == summary["params_after"]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("pruner=none", "nothing to prune with pruner=none"),
        ("calibration=0", "calibration=0 must be at least 1 image"),
        ("weights=absent.pt", "absent.pt does not exist"),
        ("pruner.modules=[net.stages]", r"pruner.modules=\['net.stages'\] names parts of the network, and task=prune"),
        ("pruner.positions=0", 'positions=0 must be "auto"'),
    ],
)
def test_what_cannot_work_says_so(config, override, message):
    with pytest.raises(ConfigError, match=message):
        run_job(config(*TASK, override))


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ([], "Mean"),
        (["task=plan"], "Mean"),
        (["task=prune"], "LeastSquares"),
        (["task=prune", "compensation=mean"], "Mean"),
        (["compensation=least_squares"], "LeastSquares"),
    ],
)
def test_what_no_training_follows_is_refitted_by_default(overrides, expected, config):
    node = resolved(config(*overrides))
    assert type(build(node.compensation, "compensation")).__name__ == expected
    assert type(build(node.pruner, "pruner").compensation).__name__ == expected


@pytest.mark.parametrize("pruner", ["taylor", "sensitivity", "label_information", "flap", "wanda", "batch_norm_scale"])
def test_criteria_of_labels_gradients_and_weights(config, weights, pruner, tmp_path):
    """The data module's labels, and cross entropy."""
    settings = config(
        "task=prune", f"pruner={pruner}", "budget.params=0.6", "logger=none", "calibration=70", f"weights={weights}"
    )
    run_job(settings)
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["params_after"] <= 0.6 * summary["params_before"]


def test_task_plan_takes_a_criterion_of_the_loss(config, capsys):
    run_job(config("task=plan", "pruner=taylor", "logger=none"))
    assert "Scores are those of the untrained network" in " ".join(capsys.readouterr().out.split())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_on_a_gpu_the_file_is_for_any_machine(config, weights, tmp_path):
    settings = config(*TASK, f"weights={weights}", "seed=3", "trainer=gpu")
    run_job(settings)
    content = torch.load(tmp_path / "out" / "pruned.pt", weights_only=True)
    assert {value.device.type for value in content["state_dict"].values()} == {"cpu"}
    load_pruned(build(resolved(settings).model, "model"), tmp_path / "out" / "pruned.pt")


def test_training_images_are_observed_as_they_are(config, weights, observed_by, training_images):
    seen = observed_by("actprune.cli.post_training.prune_trained", config(*TASK, f"weights={weights}", "data.augment=true"))
    assert len(seen) == 100
    assert torch.cdist(seen.flatten(1), training_images.flatten(1)).min(1).values.max() < 1e-3
