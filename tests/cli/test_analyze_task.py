"""``task=analyze``: tables, pictures and a summary of a network, a checkpoint or a pruned file."""

import json
import os
import shutil

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from actprune.cli.build import build, resolved
from actprune.cli.job import run_job
from actprune.cli.scoring import criteria_named, own_settings
from actprune.cli.trained import drawn_samples, fed, load_network
from actprune.core.errors import ConfigError
from actprune.report.influence import TABLES
from actprune.report.influence_plots import PICTURES
from paths import CONF

TASK = (
    "task=analyze",
    "logger=none",
    "calibration=64",
    "analyze.images=100",
    "analyze.criteria=[rms,label_information,taylor]",
    "analyze.removals.shares=[0.5]",
    "analyze.removals.n_units=3",
)


@pytest.fixture
def config(searching_config):
    return searching_config


@pytest.fixture
def weights(config, tmp_path):
    torch.manual_seed(7)
    net = build(resolved(config()).model, "model")
    path = tmp_path / "weights.pt"
    torch.save(net.state_dict(), path)
    return path


def test_it_measures_writes_and_prints(config, weights, tmp_path, capsys):
    assert run_job(config(*TASK, f"weights={weights}", "seed=3")) is None
    out = tmp_path / "out"
    assert {path.name for path in out.iterdir()} == {"config.yaml", "analysis.json", "pieces", *TABLES, *PICTURES}
    summary = json.loads((out / "analysis.json").read_text())
    assert set(summary["effect"]) == {"rms", "label_information", "taylor", "random"}
    assert (summary["observed"], summary["measured"], summary["groups"], summary["seed"]) == (64, 100, 4, 3)
    assert {"torch", "actprune"} <= summary["versions"].keys()
    assert {"commit", "seconds", "val_accuracy", "val_loss", "params", "macs"} <= summary.keys()
    printed = capsys.readouterr().out
    assert max(map(len, printed.splitlines())) <= 110
    assert "6/6 done" in printed
    assert "label_information" in printed
    assert {"task", "analyze", "weights"} <= {line.split(maxsplit=1)[0] for line in printed.splitlines() if line.strip()}
    assert not any(line.strip().startswith(("optimizer ", "pruner ", "capacity ")) for line in printed.splitlines())
    assert str(out) in printed


def test_the_same_command_goes_on(config, weights, tmp_path, capsys):
    settings = config(*TASK, f"weights={weights}")
    run_job(settings)
    first = (tmp_path / "out" / "groups.csv").read_text()
    piece = tmp_path / "out" / "pieces" / "group001.json"
    seconds = json.loads((tmp_path / "out" / "analysis.json").read_text())["seconds"]
    others = {path: path.stat().st_mtime_ns for path in piece.parent.iterdir() if path != piece}
    piece.unlink()
    for path in piece.parent.glob("group*.json"):
        content = json.loads(path.read_text())
        path.write_text(json.dumps(content | {"seconds": 1000.0}))
        os.utime(path, ns=(others[path], others[path]))
    run_job(settings)
    in_all = json.loads((tmp_path / "out" / "analysis.json").read_text())["seconds"]
    assert 3000 < in_all < 3000 + 10 * seconds + 10  # three groups are kept
    assert (tmp_path / "out" / "groups.csv").read_text() == first
    assert piece.is_file()
    del others[piece.parent / "made_from.json"]
    assert all(path.stat().st_mtime_ns == time for path, time in others.items())


def test_a_part_of_images_in_the_order_of_their_classes_has_all_classes():
    labels = torch.arange(10).repeat_interleave(100)
    loader = DataLoader(TensorDataset(torch.arange(1000), labels), batch_size=64)
    drawn = drawn_samples(loader, 150, seed=1)
    indices, classes = (torch.cat(parts) for parts in zip(*drawn, strict=True))
    assert [len(batch) for _, batch in drawn] == [64, 64, 22]
    assert torch.equal(labels[indices], classes)
    assert len(indices.unique()) == 150
    assert classes.bincount(minlength=10).min() >= 5
    assert all(
        torch.equal(one, other) for one, (other, _) in zip(indices.split(64), drawn_samples(loader, 150, 1), strict=True)
    )
    everything = torch.cat([x for x, _ in drawn_samples(loader, None, seed=1)])
    assert torch.equal(everything.sort().values, torch.arange(1000))
    assert torch.equal(everything[:150], indices)


def test_a_checkpoint_and_a_pruned_network(fast, config, tmp_path):
    run_job(fast("pruner=rms", "budget.params=0.5", "logger=none"))
    out = tmp_path / "out"
    pruned = json.loads((out / "summary.json").read_text())["params_after"]
    for path in (out / "pruned.pt", out / "checkpoints" / "last.ckpt"):
        net = build(resolved(config()).model, "model")
        load_network(net, str(path))
        assert sum(p.numel() for p in net.parameters()) == pruned
    run_job(config(*TASK, f"weights={out / 'pruned.pt'}", f"paths.output_dir={tmp_path / 'analysis'}"))
    assert json.loads((tmp_path / "analysis" / "analysis.json").read_text())["params"] == pruned


def test_all_criteria_of_the_folder_by_default(config, weights, tmp_path):
    run_job(config(*TASK, f"weights={weights}", "analyze.criteria=null", "calibration=16", "analyze.removals.n_units=1"))
    made_from = json.loads((tmp_path / "out" / "pieces" / "made_from.json").read_text())
    files = {path.stem for path in (CONF / "pruner").glob("[!_]*.yaml")}
    assert set(made_from["criteria"]) == files - {"none", "serene"}  # these rank nothing


@pytest.fixture
def chosen(monkeypatch):
    """As in a Hydra job that chose a pruner."""
    return lambda name: monkeypatch.setattr("actprune.cli.scoring.choice", lambda group: name)


def test_the_chosen_pruner_is_analyzed_as_it_is_set(config, chosen, weights, tmp_path, capsys):
    chosen("entropy")
    wanted = ("analyze.criteria=[entropy,rms]", "pruner.criterion.bins=8", "pruner.criterion.range=unit")
    run_job(config(*TASK, f"weights={weights}", *wanted))
    criteria = json.loads((tmp_path / "out" / "pieces" / "made_from.json").read_text())["criteria"]
    assert "'bins': 8" in criteria["entropy"]
    assert "'range': 'unit'" in criteria["entropy"]
    summary = json.loads((tmp_path / "out" / "analysis.json").read_text())
    assert summary["settings"] == {"entropy": {"bins": 8, "range": "unit"}}
    assert "settings that are not the default: entropy(bins=8, range=unit)" in capsys.readouterr().out


@pytest.mark.parametrize("override", ["pruner=entropy", "pruner=none", "pruner=serene"])
def test_without_settings_criteria_are_those_of_their_files(config, chosen, override):
    chosen(override.partition("=")[2])
    job = resolved(config(override))
    assert own_settings(job) == {}
    assert criteria_named(["entropy"], job, "analyze.criteria")["entropy"].bins == 64


def test_settings_of_a_criterion_that_is_not_analyzed_are_refused(config, chosen):
    chosen("entropy")
    message = r"pruner.criterion.bins=8 is of pruner=entropy, which is not among analyze.criteria=\[rms, label_information"
    with pytest.raises(ConfigError, match=message):
        run_job(config(*TASK, "pruner.criterion.bins=8"))


def test_the_command_knows_which_pruner_was_chosen(command):
    done = command("task=analyze", "pruner=rademacher", "pruner.criterion.replicates=8", "analyze.criteria=[rms]")
    assert done.returncode == 1
    assert "pruner.criterion.replicates=8 is of pruner=rademacher, which is not among analyze.criteria=[rms]" in done.stderr


def test_an_untrained_network_is_told_of(config, caplog):
    run_job(config(*TASK))
    assert "this network has learned nothing" in caplog.text


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("weights=absent.pt", "absent.pt does not exist"),
        ("calibration=0", "calibration=0 must be at least 1 image"),
        ("analyze.images=0", "analyze: images=0 must be at least 1"),
        ("analyze.criteria=[rns]", "there is no pruner=rns; choose from batch_norm_scale, entropy"),
        ("analyze.criteria=[none]", "pruner=none has no criterion"),
        ("analyze.removals.shares=[2]", r"shares=\[2\] must be 1 or more numbers"),
        ("+analyze.removals.shame=1", "has no such argument; did you mean shares"),
    ],
)
def test_what_cannot_work_says_so(config, override, message):
    with pytest.raises(ConfigError, match=message):
        run_job(config(*TASK, override))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_on_a_gpu_it_measures_the_same(config, weights, tmp_path):
    found = []
    for trainer in ("cpu", "gpu"):
        run_job(config(*TASK, f"weights={weights}", "seed=3", f"trainer={trainer}"))
        found.append(json.loads((tmp_path / "out" / "analysis.json").read_text()))
        shutil.rmtree(tmp_path / "out")
    assert found[0]["val_loss"] == pytest.approx(found[1]["val_loss"], rel=1e-3)
    for name, row in found[0]["effect"].items():
        assert row["spearman"] == pytest.approx(found[1]["effect"][name]["spearman"], abs=0.1)


def test_a_network_is_fed_in_its_precision_and_whole_numbers_stay():
    net = torch.nn.Linear(3, 2).double()
    assert fed(net, torch.zeros(1, 3)).dtype == torch.float64
    assert fed(net, torch.zeros(1, 3, dtype=torch.int64)).dtype == torch.int64


def test_training_images_are_observed_as_they_are(config, weights, observed_by, training_images):
    seen = observed_by("actprune.cli.analyze.analyze", config(*TASK, f"weights={weights}", "data.augment=true"))
    assert len(seen) == 64
    assert torch.cdist(seen.flatten(1), training_images.flatten(1)).min(1).values.max() < 1e-3
