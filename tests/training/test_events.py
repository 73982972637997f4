"""What loggers, the console and summaries are told of every step, and of every epoch."""

import csv
from types import SimpleNamespace

import pytest

from actprune.core.budget import Budget
from actprune.criteria import Magnitude
from actprune.schedule import Schedule
from actprune.training import MetricsCSV
from actprune.training.events import broke_after_cut, peak_memory, step_line
from foreign import OneNetwork, OwnForward, loader

SCHEDULE = Schedule("linear", start=0, interval=2, steps=2)


def test_an_event_says_what_was_cut_where_and_what_it_took(pruning, trainer, list_logger):
    module, callback = OwnForward(), pruning(schedule=SCHEDULE)
    trainer(callback, logger=[list_logger], log_every_n_steps=1).fit(module, loader(), loader(32, 1))
    assert [event["epoch"] for event in callback.events] == [1, 3]
    first, second = callback.events
    assert first["widths"]["conv1"][0] == 12
    assert second["widths"]["conv1"][0] == first["widths"]["conv1"][1]
    assert second["widths"]["conv1"][1] == module.conv1.out_channels
    assert first["params"][1] == second["params"][0]
    assert second["params"][1] == sum(p.numel() for p in module.parameters())
    assert second["macs"][1] == callback.pruner.macs
    for event in callback.events:
        assert all(value > 0 for value in event["seconds"].values())
        assert set(event["seconds"]) == {"observing", "planning", "cutting"}
    calls = [(step, call) for step, call in list_logger.calls if "surgery/cutting_seconds" in call]
    assert [step for step, _ in calls] == [6, 18]
    assert [call["surgery/width/conv1"] for _, call in calls] == [event["widths"]["conv1"][1] for event in callback.events]
    assert {"surgery/observing_seconds", "surgery/planning_seconds"} < set(calls[0][1])


def test_a_line_of_a_large_network_fits_into_100_columns():
    pruner = SimpleNamespace(params_before=125_557_032, macs_before=41_100_000_000)
    event = {"epoch": 98, "step": 12, "params": [0, 112_345_678], "macs": [0, 20_500_000_000],
             "widths": dict.fromkeys(range(33)), "seconds": {"cutting": 112.31}}  # fmt: skip
    expected = "pruning step 12, before epoch 99: params 112,345,678 (89.5%), MACs 20.5G (49.9%), 33 groups, 112.3 s"
    assert step_line(event, [pruner]) == expected
    assert len(expected) <= 100


def test_sizes_and_memory_are_gauges_of_every_epoch(pruning, trainer, tmp_path):
    """Of those without validation too."""
    callback = pruning(schedule=SCHEDULE, criterion=Magnitude(), budget=Budget(params=0.5))
    logger = MetricsCSV(tmp_path / "metrics.csv")
    options = {"logger": logger, "log_every_n_steps": 1, "check_val_every_n_epoch": 2}
    trainer(callback, **options).fit(OneNetwork(), loader(), loader(32, 1))
    with (tmp_path / "metrics.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["prune/params"]]
    assert [int(row["epoch"]) for row in rows] == list(range(6))
    params = [int(row["prune/params"]) for row in rows]
    assert params == sorted(params, reverse=True)
    assert params[0] == callback.pruner.params_before
    assert params[-1] == callback.pruner.params
    assert all(int(row["prune/macs"]) > 0 for row in rows)
    peaks = [float(row["memory/peak_mib"]) for row in rows]
    assert peaks == sorted(peaks)
    assert peaks[0] > 50


def test_peak_memory_is_that_of_the_process():
    resource = pytest.importorskip("resource")
    before = peak_memory(OneNetwork())
    assert before == resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    block = bytearray(300 * 2**20)
    assert peak_memory(OneNetwork()) >= min(before + 1, 300)
    del block


def test_why_it_stopped(pruning, trainer, capsys):
    callback = pruning(schedule=SCHEDULE)
    trainer(callback).fit(OneNetwork(), loader(), loader(32, 1))
    assert callback.stopped == {"reason": "budget", "message": "the budget params=0.4 was reached"}
    early = pruning(schedule=Schedule("one_shot", start=4))
    trainer(early, max_steps=12).fit(OneNetwork(), loader(), loader(32, 1))
    assert early.stopped["reason"] == "epochs"
    assert "before the last step; the budget params=0.4 was not reached" in early.stopped["message"]


@pytest.mark.parametrize("options", [{"val_check_interval": 100, "check_val_every_n_epoch": None}, {"max_steps": 3}])
def test_a_run_without_validation_says_so(options, pruning, trainer, capsys):
    callback = pruning(schedule=SCHEDULE)
    trainer(callback, **options).fit(OneNetwork(), loader(), loader(32, 1))
    assert callback.history == []
    assert callback.stopped["reason"] == "epochs"
    assert " and nothing was validated (val_check_interval=" in callback.stopped["message"]
    assert ", so no step was decided; the budget params=0.4 was not reached" in callback.stopped["message"]
    assert "nothing was validated" in " ".join(capsys.readouterr().out.split())


def test_advice_names_what_was_cut():
    assert "step 2, which cut conv1. If the message" in broke_after_cut({"step": 2, "widths": {"conv1": [4, 3]}})
