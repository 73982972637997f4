"""Cuts that no validation follows: taken back where a metric is guarded, planned away where that is known beforehand."""

import copy

import pytest
import torch
from lightning import LightningModule
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.nn import functional as F

from actprune.core.budget import Budget
from actprune.core.errors import ConfigError
from actprune.schedule import Schedule
from actprune.training.guard import Guard
from actprune.training.timing import Timetable
from foreign import loader, network

pytestmark = pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
WHOLE = 2364
ONE = Schedule("one_shot", start=3)

UNSEEN = {
    "steps run out": {"max_steps": 25},
    "validation after batches": {"check_val_every_n_epoch": None, "val_check_interval": 20},
}


class Watched(LightningModule):
    """Logs, in the epochs that ``logs`` names, whether anything was cut, which is a loss unless ``forgiving``."""

    def __init__(self, forgiving=False, logs=range(100)):
        super().__init__()
        self.net, self.forgiving, self.logs = network(), forgiving, logs

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def validation_step(self, batch, batch_idx):
        self.net(batch[0])
        if self.current_epoch in self.logs:
            self.log("quality", float(self.forgiving or n_params(self) == WHOLE))

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), 0.01)


def n_params(module):
    return sum(p.numel() for p in module.parameters())


@pytest.fixture
def guarded(pruning):
    def make(schedule=ONE):
        return pruning(schedule=schedule, budget=Budget(params=0.5), monitor="quality", mode="max", max_metric_drop=0.0)

    return make


@pytest.mark.parametrize("case", UNSEEN)
def test_the_history_ends_with_the_network_that_is_left(case, pruning, trainer, list_logger):
    """Without a metric, which nobody measured."""
    module, callback = Watched(), pruning(schedule=ONE, budget=Budget(params=0.5), monitor="quality")
    trainer(callback, logger=[list_logger], log_every_n_steps=1, **UNSEEN[case]).fit(module, loader(), loader(32, 1))
    before, last = callback.history[-2:]
    assert (before["params"], before["quality"]) == (WHOLE, 1.0)
    assert last == {
        "epoch": 4 if "max_steps" in UNSEEN[case] else 5,
        "step": 1,
        "params": n_params(module),
        "macs": last["macs"],
    }
    assert [call["prune/params"] for _, call in list_logger.calls if "prune/params" in call][-1] == n_params(module) < WHOLE


@pytest.mark.parametrize("forgiving", [False, True])
@pytest.mark.parametrize("case", UNSEEN)
def test_a_cut_that_no_validation_saw_is_taken_back(case, forgiving, guarded, trainer, capsys):
    """Also if it would have kept the metric: nobody knows."""
    module, callback = Watched(forgiving), guarded()
    trainer(callback, **UNSEEN[case]).fit(module, loader(), loader(32, 1))
    assert [event.get("went_back", False) for event in callback.events] == [False, True]
    assert n_params(module) == callback.pruner.params == WHOLE
    assert callback.guard.lost[-1]["value"] is None
    assert callback.guard.lost[-1]["epoch"] == callback.history[-1]["epoch"]
    out = capsys.readouterr().out
    assert "no validation saw quality after the step, max_metric_drop=0: back to 2,364 parameters" in out.splitlines()
    assert callback.stopped["reason"] == "metric"


def test_the_last_value_counts_wherever_in_an_epoch_it_was_measured(guarded, trainer):
    """After half of the only epoch since the cut, in the middle of which training ends."""
    for forgiving, left in ((True, 0.5 * WHOLE), (False, WHOLE)):
        module, callback = Watched(forgiving), guarded()
        trainer(callback, max_steps=28, val_check_interval=0.5).fit(module, loader(), loader(32, 1))
        assert [row["epoch"] for row in callback.history if row["step"]] == [4]
        assert n_params(module) <= left
        assert bool(callback.guard.lost) is not forgiving
    assert callback.guard.lost[-1]["value"] == 0.0


def test_what_was_seen_is_in_checkpoints(guarded, trainer, tmp_path):
    start = Watched(forgiving=True)
    saved = ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1, save_on_train_epoch_end=True)
    trainer(guarded(), saved, enable_checkpointing=True).fit(copy.deepcopy(start), loader(), loader(32, 1))
    for epoch in (3, 4, 5):
        module, callback = copy.deepcopy(start), guarded()
        trainer(callback).fit(module, loader(), loader(32, 1), ckpt_path=tmp_path / f"epoch={epoch}.ckpt")
        assert n_params(module) <= 0.5 * WHOLE
        assert not callback.guard.lost


THREE = Schedule("linear", start=2, interval=2, steps=3)


def test_only_what_this_validation_logged_counts(guarded, trainer):
    """Lightning keeps the value of an earlier validation, which saw another network."""
    module, callback = Watched(logs=range(0, 12, 3)), guarded(THREE)
    trainer(callback, max_epochs=12).fit(module, loader(), loader(32, 1))
    assert [row["epoch"] for row in callback.history if "quality" in row] == [0, 3, 6, 9]
    assert [(event["epoch"], event.get("went_back", False)) for event in callback.events] == [
        (3, False),
        (5, True),
        (7, False),
        (10, True),  # judged when the metric of epoch 9 is there; epoch 8 has none
    ]
    assert [lost["value"] for lost in callback.guard.lost] == [0.0, 0.0]
    assert n_params(module) == WHOLE


def test_a_value_from_before_the_cut_is_none_of_the_cut_network(guarded, trainer):
    module, callback = Watched(forgiving=True, logs=range(4)), guarded()
    trainer(callback, max_epochs=8).fit(module, loader(), loader(32, 1))
    assert [lost["value"] for lost in callback.guard.lost] == [None]
    assert n_params(module) == WHOLE


def test_an_equal_value_that_is_logged_again_counts(guarded, trainer):
    module, callback = Watched(forgiving=True), guarded(THREE)
    trainer(callback, max_epochs=12).fit(module, loader(), loader(32, 1))
    assert [row["quality"] for row in callback.history] == [1.0] * 12
    assert not callback.guard.lost
    assert n_params(module) <= 0.5 * WHOLE


def test_a_due_step_waits_for_the_verdict_on_the_last_one(guarded, trainer):
    """With the network that a verdict may go back to."""
    module, callback = Watched(logs=(0, 1, 2, 9)), guarded(THREE)
    trainer(callback, max_epochs=12).fit(module, loader(), loader(32, 1))
    assert [(event["epoch"], event.get("went_back", False)) for event in callback.events] == [(3, False), (10, True)]
    assert callback.guard.lost[0]["value"] == 0.0
    assert n_params(module) == WHOLE


def test_a_resumed_run_counts_the_same_values(guarded, trainer, tmp_path):
    start = Watched(logs=range(0, 12, 3))
    whole, full = copy.deepcopy(start), guarded(THREE)
    saved = ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1, save_on_train_epoch_end=True)
    trainer(full, saved, enable_checkpointing=True, max_epochs=12).fit(whole, loader(), loader(32, 1))
    for epoch in (3, 6, 8, 9):
        module, callback = copy.deepcopy(start), guarded(THREE)
        path = tmp_path / f"epoch={epoch}.ckpt"
        trainer(callback, max_epochs=12).fit(module, loader(), loader(32, 1), ckpt_path=path)
        assert callback.history == full.history
        assert callback.guard.lost == full.guard.lost
        assert all(torch.equal(value, whole.state_dict()[name]) for name, value in module.state_dict().items())


def test_what_the_lost_network_measured_is_no_reason_to_stop():
    """NaN after the cut, then a step is due before the metric is logged again."""
    guard = Guard("x", 0.0, "max")
    guard.see(0.9, ())
    guard.begin(0.5, 3, cuts=True)
    guard.snapshot = object()
    guard.see(float("nan"), ())
    guard.judge(3)
    assert guard.goes_back
    guard.snapshot = None
    guard.begin(0.25, 5, cuts=True)
    assert guard.reference == 0.9


def test_a_verdict_waits_for_a_value():
    guard = Guard("x", 0.0, "max")
    guard.see(0.9, ())
    guard.begin(0.5, 3, cuts=True)
    guard.snapshot = object()
    guard.see(None, ())
    guard.judge(4)
    assert guard.trial == 0.5
    guard.see(0.95, ())
    guard.judge(5)
    assert (guard.good, guard.lost) == (0.5, [])
    guard.begin(1.0, 7, cuts=True)
    guard.snapshot = object()
    guard.judge(8, last=True)
    assert guard.lost == [{"epoch": 8, "share": 1.0, "value": None, "reference": 0.95}]


@pytest.mark.parametrize("every", [1, 2, 3, 7, 10, 12, 13])
@pytest.mark.parametrize("max_epochs", [2, 3, 5, 24, 25])
def test_a_validation_follows_every_step(max_epochs, every, trainer):
    validated = [epoch for epoch in range(max_epochs) if (epoch + 1) % every == 0]
    fitted = trainer(max_epochs=max_epochs, check_val_every_n_epoch=every)
    if len(validated) < 2:
        with pytest.raises(ConfigError, match="no validation is followed by another one; .* validate more often"):
            Timetable.of(Schedule(), fitted)
        return
    table = Timetable.of(Schedule(), fitted)
    assert list(table.epochs) == sorted(set(table.epochs))
    assert list(table.shares) == sorted(table.shares)
    decided, taken = -1, []
    for epoch in validated:
        due = table.due(decided, epoch)
        if due is not None:
            taken.append((epoch, due))
            decided = epoch
            assert epoch < table.recovered(decided)
    assert taken[-1][1] == 1.0
    assert taken[-1][0] < validated[-1]


@pytest.mark.parametrize(
    "schedule", [ONE, Schedule(steps=3, start=1), Schedule(interval=2), Schedule("one_shot", start=2)], ids=str
)
def test_what_was_asked_for_is_kept_or_refused(schedule, trainer):
    fitted = trainer(max_epochs=5, check_val_every_n_epoch=2)
    if max(schedule.epochs(5)) <= 1:
        assert Timetable.of(schedule, fitted).epochs == tuple(schedule.epochs(5))
        return
    with pytest.raises(ConfigError, match="check_val_every_n_epoch=2 and max_epochs=5 the last validation that another one"):
        Timetable.of(schedule, fitted)
