import csv
from collections import Counter
from types import SimpleNamespace

import wandb
from lightning import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint, RichProgressBar
from lightning.pytorch.loggers import WandbLogger
from wandb.integration.torch.wandb_torch import TorchHistory

from actprune.schedule import Schedule
from actprune.training import EpochLines, MetricsCSV, progress_bar
from actprune.training.logging import define_axes
from foreign import OwnForward, loader


def rows(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_every_logger_gets_size_and_metric_in_one_call(pruning, trainer, list_logger):
    callback = pruning(monitor="val_acc", schedule=Schedule("linear", start=0, interval=2, steps=2))
    trainer(callback, logger=[list_logger], log_every_n_steps=1).fit(OwnForward(), loader(), loader(32, 1))
    calls = [(step, call) for step, call in list_logger.calls if "prune/params" in call]
    assert [set(call) for _, call in calls] == [{"prune/params", "prune/macs", "prune/step", "prune/val_acc", "epoch"}] * 6
    assert [call["prune/step"] for _, call in calls] == [0, 1, 1, 2, 2, 2]
    for (_, call), row in zip(calls, callback.history, strict=True):
        assert call["prune/params"] == row["params"]
        assert type(call["prune/macs"]) is int
    assert calls[-1][1]["prune/params"] == callback.pruner.params
    own = [(step, call) for step, call in list_logger.calls if "val_acc" in call]
    assert [step for step, _ in own] == [step for step, _ in calls]
    assert [float(call["val_acc"]) for _, call in own] == [call["prune/val_acc"] for _, call in calls]


def test_a_metric_that_nobody_logs_is_told_of_once(pruning, trainer, capsys):
    callback = pruning(monitor="val/acc")
    trainer(callback).fit(OwnForward(), loader(), loader(32, 1))
    said = [line for line in capsys.readouterr().out.splitlines() if "monitor=" in line]
    assert len(said) == 1
    assert said[0].startswith("monitor='val/acc' was not logged by validation and is left out; it logged")
    assert all("val/acc" not in row for row in callback.history)


def test_metric_is_what_checkpoints_monitor_by_default(pruning, trainer, tmp_path):
    callback = pruning()
    best = ModelCheckpoint(tmp_path, "{epoch}-{prune/step:.0f}", auto_insert_metric_name=False, monitor="val_loss")
    trainer(callback, best, enable_checkpointing=True).fit(OwnForward(), loader(), loader(32, 1))
    assert all("val_loss" in row for row in callback.history)
    epoch, step = best.best_model_path.rpartition("/")[2].removesuffix(".ckpt").split("-")
    assert callback.history[int(epoch)]["step"] == int(step) > 0


def test_csv_has_one_row_per_step_and_goes_on(tmp_path):
    path = tmp_path / "deep" / "metrics.csv"
    logger = MetricsCSV(path)
    logger.log_metrics({"a": 1.5, "epoch": 0}, step=3)
    logger.log_metrics({"b": 2}, step=3)
    logger.log_metrics({"a": 0.5}, step=7)
    logger.save()
    again = MetricsCSV(path)
    again.log_metrics({"c": 4}, step=7)
    again.log_metrics({"c": 5})
    again.finalize("success")
    assert rows(path) == [
        {"epoch": "0", "step": "3", "a": "1.5", "b": "2", "c": ""},
        {"epoch": "", "step": "7", "a": "0.5", "b": "", "c": "4"},
        {"epoch": "", "step": "8", "a": "", "b": "", "c": "5"},
    ]
    assert [p.name for p in path.parent.iterdir()] == ["metrics.csv"]


def test_csv_of_a_run_has_one_row_per_epoch(pruning, trainer, tmp_path):
    logger = MetricsCSV(tmp_path / "metrics.csv")
    run = trainer(pruning(monitor="val_loss"), logger=logger, max_epochs=3, log_every_n_steps=1)
    run.fit(OwnForward(), loader(), loader(32, 1))
    table = [row for row in rows(tmp_path / "metrics.csv") if row["val_loss"]]
    assert [row["epoch"] for row in table] == ["0", "1", "2"]
    assert all(float(row["prune/val_loss"]) == float(row["val_loss"]) for row in table)


def test_nothing_logged_writes_nothing(tmp_path):
    MetricsCSV(tmp_path / "metrics.csv").finalize("failed")
    assert not list(tmp_path.iterdir())


def test_weights_and_biases_plots_against_parameters(pruning, trainer, tmp_path):
    class Run:
        def __init__(self):
            self.defined = {}

        def define_metric(self, name, step_metric=None):
            self.defined[name] = step_metric

    logger = WandbLogger(save_dir=tmp_path, offline=True, experiment=Run())
    fitted = trainer(pruning(), logger=logger)
    define_axes(fitted)
    assert logger.experiment.defined == {"prune/params": None, "prune/*": "prune/params"}


def test_wandb_watch_goes_on_and_is_not_told_of_traces(pruning, trainer, monkeypatch):
    """Its hooks on the module log histograms of the parameters, those on the parameters histograms of their gradients."""
    logged, module = Counter(), OwnForward()
    monkeypatch.setattr(wandb, "run", SimpleNamespace(_log=lambda content, commit: logged.update(content.keys())))
    history = TorchHistory()
    history.add_log_parameters_hook(module, log_freq=1)
    history.add_log_gradients_hook(module, log_freq=1)
    fitted = trainer(pruning(), num_sanity_val_steps=2)
    fitted.fit(module, loader(), loader(32, 1))
    names = [name for name, _ in module.named_parameters()]
    assert module.conv1.out_channels < 12
    batches = {"gradients": fitted.global_step, "parameters": fitted.global_step + 2 + 6 * 2}
    assert logged == {f"{kind}/{name}": n for kind, n in batches.items() for name in names}


def test_progress_is_lines_where_there_is_no_terminal(capsys, trainer):
    lines = progress_bar()
    assert isinstance(lines, EpochLines)
    run = Trainer(max_epochs=2, accelerator="cpu", logger=False, enable_checkpointing=False, callbacks=[lines],
                  enable_model_summary=False)  # fmt: skip
    run.fit(OwnForward(), loader(), loader(32, 1))
    out = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in out] == ["epoch 1/2", "epoch 2/2"]
    assert "val_loss" in out[0]
    lines.disable()
    assert not lines.is_enabled
    lines.enable()
    assert lines.is_enabled


def test_lines_hold_what_was_measured_in_their_epoch(capsys, trainer):
    run = Trainer(max_epochs=4, accelerator="cpu", logger=False, enable_checkpointing=False, callbacks=[progress_bar()],
                  enable_model_summary=False, check_val_every_n_epoch=2)  # fmt: skip
    run.fit(OwnForward(), loader(), loader(32, 1))
    out = capsys.readouterr().out.splitlines()
    assert ["val_loss" in line for line in out] == [False, True, False, True]
    assert all(": loss " in line for line in out)


def test_progress_is_a_bar_on_a_terminal(monkeypatch):
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    assert isinstance(progress_bar(), RichProgressBar)
