"""``export=[...]`` and the quality guard on the command line."""

import json

import pytest
import torch

from actprune.cli.build import build, resolved
from actprune.cli.job import run_job
from actprune.core.errors import ConfigError
from actprune.surgery import load_pruned
from actprune.training import load_exported
from paths import needs_onnx

pytestmark = pytest.mark.usefixtures("no_pictures")


def summary(folder):
    return json.loads((folder / "summary.json").read_text())


@needs_onnx
@pytest.mark.parametrize("pruner", ["magnitude", pytest.param("none", marks=pytest.mark.slow)])
def test_export_writes_the_network(pruner, fast, tmp_path, capsys):
    config = fast(f"pruner={pruner}", "export=[onnx,torch_export,state_dict]")
    run_job(config)
    folder = tmp_path / "out" / "exported"
    assert {path.name for path in folder.iterdir()} == {"network.onnx", "network.pt2", "network.pt"}
    assert "exported: network.onnx, network.pt2, network.pt" in capsys.readouterr().out
    net = build(resolved(config).model, "model")
    load_pruned(net, folder / "network.pt")
    x = torch.randn(5, 1, 8, 8)
    torch.testing.assert_close(load_exported(folder / "network.pt2")(x), net.eval()(x), rtol=1e-5, atol=1e-6)


def test_unknown_formats_are_refused_before_anything_runs(fast, tmp_path):
    with pytest.raises(ConfigError, match="export: 'tflite' is not known; choose from onnx"):
        run_job(fast("export=[tflite]"))
    assert not (tmp_path / "out").exists()


def test_summary_says_why_pruning_stopped(fast, tmp_path):
    run_job(fast("pruner=magnitude"))
    assert summary(tmp_path / "out")["stopped"]["reason"] == "budget"
    (event,) = summary(tmp_path / "out")["events"]
    assert event["epoch"] == 1
    assert set(event["seconds"]) == {"observing", "planning", "cutting"}
    assert all(before > after for before, after in event["widths"].values())


def test_no_loss_goes_back_and_the_summary_is_of_the_good_network(fast, tmp_path):
    """A budget that ruins the network after few batches: nothing is left out, and the numbers are those of what is written."""
    trainer = ("trainer.limit_train_batches=8", "trainer.max_epochs=4", "trainer.limit_val_batches=1.0", "optimizer.lr=0.003")
    ruin = ("pruner=random", "compensation=none", "budget.params=0.15", "schedule.start=2")
    config = fast(*trainer, *ruin, "pruner.stop=no_loss")
    run_job(config)
    found = summary(tmp_path / "out")
    assert found["stopped"]["reason"] == "metric"
    assert found["params_after"] == found["params_before"]
    assert found["events"][-1]["went_back"]
    before = [row for row in found["history"] if row["params"] == found["params_before"]]
    assert found["val_accuracy"] == pytest.approx(before[-1]["val_accuracy"])
    net = build(resolved(config).model, "model")
    load_pruned(net, tmp_path / "out" / "pruned.pt")
    assert sum(p.numel() for p in net.parameters()) == found["params_before"]


def test_only_a_part_of_the_network(fast, tmp_path):
    config = fast("pruner=magnitude", "pruner.modules=[net.stages]", "budget.params=0.6")
    run_job(config)
    found = summary(tmp_path / "out")
    net = build(resolved(config).model, "model")
    assert sum(p.numel() for p in net.parameters()) == found["params_before"]
    load_pruned(net, tmp_path / "out" / "pruned.pt")
    assert sum(p.numel() for p in net.parameters()) == found["params_after"] < found["params_before"]


def test_settings_of_the_guard_are_checked(fast):
    with pytest.raises(ConfigError, match="pruner: stop='loss' must be 'budget' or 'no_loss'"):
        run_job(fast("pruner.stop=loss"))
    with pytest.raises(ConfigError, match="modules names 'net.stage'"):
        run_job(fast("pruner.modules=[net.stage]"))
