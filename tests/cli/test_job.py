"""The main job: what it writes, returns and prints."""

import csv
import json

import pytest
import torch
from PIL import Image

from actprune.cli.build import build, resolved
from actprune.cli.job import run_job
from actprune.core.record import SurgeryRecord
from actprune.graph import trace
from actprune.surgery import load_pruned

FILES = {
    "config.yaml", "metrics.csv", "surgery_record.json", "pruned.pt", "summary.json", "params_vs_accuracy.png",
    "widths.png", "checkpoints",
}  # fmt: skip


@pytest.fixture
def out(tmp_path):
    return tmp_path / "out"


def summary_of(folder):
    return json.loads((folder / "summary.json").read_text())


def test_main_job(fast, out, capsys):
    config = fast("pruner=entropy", "seed=3", "optimize=test_accuracy", "budget.params=0.3")
    score = run_job(config)
    printed = capsys.readouterr().out
    assert {path.name for path in out.iterdir()} == FILES
    summary = summary_of(out)
    assert score == summary["test_accuracy"]
    assert summary["seed"] == 3
    assert summary["criterion"] == "entropy"
    assert summary["budget"] == {"params": 0.3}
    assert summary["params_after"] <= 0.3 * summary["params_before"]
    assert {"torch", "lightning", "python", "actprune"} <= summary["versions"].keys()
    assert summary["seconds"] > 0

    fresh = build(resolved(config).model, "model")
    assert sum(p.numel() for p in fresh.parameters()) == summary["params_before"]
    load_pruned(fresh, out / "pruned.pt")
    assert sum(p.numel() for p in fresh.parameters()) == summary["params_after"]
    graph = trace(fresh, torch.zeros(1, 1, 8, 8))
    assert graph.macs == summary["macs_after"]
    record = SurgeryRecord.from_dict(json.loads((out / "surgery_record.json").read_text()))
    assert record.steps[-1]["params_after"] == summary["params_after"]

    last = torch.load(out / "checkpoints" / "last.ckpt", weights_only=True)
    assert last["epoch"] == 2  # also where no epoch since the step was better than the first one
    assert sum(last["state_dict"][f"net.{name}"].numel() for name, _ in fresh.named_parameters()) == summary["params_after"]

    with (out / "metrics.csv").open() as file:
        epochs = [row for row in csv.DictReader(file) if row["val/accuracy"]]
    assert [int(row["prune/params"]) for row in epochs] == [row["params"] for row in summary["history"]]
    assert float(epochs[-1]["val/accuracy"]) == summary["val_accuracy"]
    for picture in ("params_vs_accuracy.png", "widths.png"):
        with Image.open(out / picture) as image:
            assert min(image.size) > 300

    assert max(map(len, printed.splitlines())) <= 110
    assert "pruning step 1, before epoch 2" in printed
    assert str(out) in printed
    assert "Entropy" in printed


def test_baseline_prunes_nothing(fast, out, capsys):
    run_job(fast("pruner=none"))
    summary = summary_of(out)
    assert {path.name for path in out.iterdir()} == FILES - {"surgery_record.json", "pruned.pt", "widths.png"}
    assert summary["criterion"] == "none"
    assert summary["budget"] is None
    assert summary["params_after"] == summary["params_before"]
    assert summary["macs_after"] == summary["macs_before"] > 0
    assert len(summary["history"]) == 3
    assert "pruning step" not in capsys.readouterr().out


def test_baseline_and_pruned_count_the_same_network(fast, out):
    run_job(fast("pruner=none"))
    baseline = summary_of(out)
    run_job(fast("pruner=random", f"paths.output_dir={out.with_name('other')}"))
    pruned = summary_of(out.with_name("other"))
    for key in ("params_before", "macs_before"):
        assert pruned[key] == baseline[key]


@pytest.mark.parametrize("stop", ["budget", "no_loss"])
def test_a_network_that_no_validation_saw_is_validated_at_the_end(fast, out, stop):
    """Everything that tells of the run tells of the network that is left: cut, or taken back."""
    score = run_job(fast("+trainer.max_steps=7", "schedule.start=1", f"pruner.stop={stop}", "pruner=magnitude"))
    summary = summary_of(out)
    history = summary["history"]
    assert [row["epoch"] for row in history] == [0, 1, 2]
    assert history[-1]["params"] == summary["params_after"]
    assert (summary["params_left"] < 0.4) is (stop == "budget")
    assert history[-1]["val_accuracy"] == summary["val_accuracy"] == score
    assert summary["epochs"] == 3
    if stop == "no_loss":
        assert summary["val_accuracy"] == history[-2]["val_accuracy"]
        assert "no validation saw val/accuracy after the step" in summary["stopped"]["message"]
    with (out / "metrics.csv").open() as file:
        last = list(csv.DictReader(file))[-1]
    assert int(last["prune/params"]) == summary["params_after"]
    assert float(last["val/accuracy"]) == pytest.approx(summary["val_accuracy"])


@pytest.mark.parametrize(
    "validating", [["+trainer.val_check_interval=0.34"], ["trainer.check_val_every_n_epoch=2", "trainer.max_epochs=5"]]
)
def test_epochs_are_counted_and_not_validations(fast, out, capsys, no_pictures, validating):
    run_job(fast("pruner=none", "logger=none", *validating))
    summary = summary_of(out)
    trained = 5 if len(validating) == 2 else 3
    assert summary["epochs"] == trained != len(summary["history"])
    assert f"{trained} epochs in " in capsys.readouterr().out


def test_same_seed_same_network(fast, out):
    nets = []
    for folder, seed in (("a", 1), ("b", 1), ("c", 2)):
        run_job(fast(f"seed={seed}", "pruner=random", f"paths.output_dir={out / folder}"))
        nets.append(torch.load(out / folder / "pruned.pt", weights_only=True))
    assert nets[0]["surgery_record"] == nets[1]["surgery_record"] != nets[2]["surgery_record"]
    assert all(torch.equal(value, nets[1]["state_dict"][name]) for name, value in nets[0]["state_dict"].items())


def test_goes_on_from_a_checkpoint(fast, out, tmp_path):
    run_job(fast("callbacks.checkpoint.save_top_k=-1"))
    whole = torch.load(out / "pruned.pt", weights_only=True)["state_dict"]
    (path,) = (out / "checkpoints").glob("epoch000*")
    kept = path.rename(tmp_path / "kept.ckpt")
    run_job(fast("callbacks.checkpoint.save_top_k=-1", f"ckpt_path={kept}", f"paths.output_dir={tmp_path / 'again'}"))
    again = torch.load(tmp_path / "again" / "pruned.pt", weights_only=True)["state_dict"]
    assert all(torch.equal(value, again[name]) for name, value in whole.items())
    assert [row["epoch"] for row in summary_of(tmp_path / "again")["history"]] == [0, 1, 2]


def test_plan_trains_nothing(fast, out, capsys):
    assert run_job(fast("task=plan", "budget.params=0.5", "logger=many")) is None
    printed = capsys.readouterr().out
    assert {path.name for path in out.iterdir()} == {"config.yaml", "groups.svg"}
    assert "stages.0.0.conv1" in printed
    assert "untrained network" in printed
    assert "100.0%" in printed


def test_plan_tells_when_the_run_takes_its_steps(fast, out, capsys, no_pictures):
    """A step that falls on an epoch without validation waits, and the later of two that wait together is taken."""
    steps = ("schedule.start=1", "schedule.interval=1", "schedule.steps=3", "trainer.max_epochs=8")
    settings = (*steps, "trainer.check_val_every_n_epoch=2", "pruner=magnitude", "logger=none")
    run_job(fast("task=plan", *settings))
    lines = [line.split() for line in capsys.readouterr().out.splitlines() if "%" in line]
    planned = [line[1] for line in lines if len(line) == 5 and line[0].isdigit()]
    run_job(fast(*settings, f"paths.output_dir={out / 'run'}"))
    printed = capsys.readouterr().out
    assert planned == [line.split("before epoch ")[1].split(":")[0] for line in printed.splitlines() if "before epoch" in line]
    assert planned == ["3", "5"]


def test_one_run_of_weights_and_biases_per_job(fast, out):
    import wandb

    for folder in ("a", "b"):
        run_job(fast("logger=many", f"paths.output_dir={out / folder}"))
        assert wandb.run is None
        assert len(list((out / folder / "wandb").glob("offline-run-*"))) == 1


@pytest.mark.parametrize("precision", ["bf16-true", "64-true"])
def test_a_network_of_another_precision_ends_as_any_other(fast, out, no_pictures, precision):
    """Sizes are counted, and what is exported is compared, on images in the network's own precision."""
    run_job(fast(f"trainer.precision={precision}", "export=[state_dict]", "logger=none", "pruner=magnitude"))
    assert json.loads((out / "summary.json").read_text())["params_left"] < 0.4
    assert list((out / "exported").iterdir())


def test_nothing_is_logged_without_loggers(fast, out):
    run_job(fast("logger=none"))
    assert not (out / "metrics.csv").exists()
    assert summary_of(out)["epochs"] == 3
