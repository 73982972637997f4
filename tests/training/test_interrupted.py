"""Signals and interrupts that come while a step is planned, carried out or taken back."""

import signal
from dataclasses import dataclass

import pytest
import torch
from lightning import Callback
from lightning.pytorch.callbacks import OnExceptionCheckpoint
from torch import nn

from actprune import Pruner
from actprune.core.budget import Budget
from actprune.criteria import Entropy
from actprune.schedule import Schedule
from actprune.surgery.transaction import Transaction
from actprune.training import deciding
from foreign import OneNetwork, loader

pytestmark = [
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`"),
    pytest.mark.filterwarnings("ignore:.*was called without a model"),  # OnExceptionCheckpoint, also at the first fit
    pytest.mark.filterwarnings("ignore:.*there is no last checkpoint available"),
]
STEPS = Schedule("linear", start=1, interval=2, steps=2)


@pytest.fixture(autouse=True)
def _interrupts():
    """Ctrl-C raises, also where a shell started this in the background, which ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


class Saves(Callback):
    """Saves at once when SIGUSR1 comes, as Lightning does for SLURM; it comes while a cut network proves that it runs."""

    def __init__(self, path):
        self.path, self.signalled = path, 0

    def on_fit_start(self, trainer, pl_module):
        self.before = signal.signal(signal.SIGUSR1, lambda *_: trainer.save_checkpoint(self.path))
        pl_module.model[-1].register_forward_hook(self.ran)

    def ran(self, module, args, output):
        if module.in_features < 64 and not self.signalled and self.armed:
            self.signalled += 1
            signal.raise_signal(signal.SIGUSR1)

    armed = False

    def on_validation_end(self, trainer, pl_module):
        self.armed = trainer.current_epoch == 1

    def teardown(self, trainer, pl_module, stage):
        signal.signal(signal.SIGUSR1, self.before)


def test_a_checkpoint_that_a_signal_asks_for_in_the_middle_of_a_step_holds_all_of_it(pruning, trainer, tmp_path):
    saves = Saves(tmp_path / "asked.ckpt")
    trainer(saves, pruning(schedule=STEPS)).fit(OneNetwork(), loader(), loader(32, 1))
    assert saves.signalled == 1
    callback = pruning(schedule=STEPS)
    trainer(callback).fit(OneNetwork(), loader(), loader(32, 1), ckpt_path=saves.path)
    assert [event["epoch"] for event in callback.events] == [2, 4]
    assert callback.stopped["reason"] == "budget"


def test_interrupt_between_the_cut_and_what_follows_it(pruning, trainer, tmp_path, monkeypatch):
    rewrap = deciding.rewrap

    def interrupted(trainer):
        monkeypatch.setattr(deciding, "rewrap", rewrap)
        signal.raise_signal(signal.SIGINT)
        rewrap(trainer)

    monkeypatch.setattr(deciding, "rewrap", interrupted)
    saving, callback = OnExceptionCheckpoint(tmp_path, "broken"), pruning(schedule=STEPS)
    with pytest.raises(SystemExit):
        trainer(pruning(schedule=STEPS), saving, enable_checkpointing=True).fit(OneNetwork(), loader(), loader(32, 1))
    trainer(callback).fit(OneNetwork(), loader(), loader(32, 1), ckpt_path=tmp_path / "broken.ckpt")
    assert [event["epoch"] for event in callback.events] == [2, 4]
    assert callback.stopped["reason"] == "budget"


@dataclass(frozen=True)
class Interrupted(Entropy):
    """Ctrl-C comes while the last step is planned."""

    def score(self, view):
        if len(CALLBACK[0].events) == 1:
            signal.raise_signal(signal.SIGINT)
        return super().score(view)


CALLBACK = []


def test_a_step_whose_planning_was_interrupted_is_taken_later(pruning, trainer, tmp_path):
    CALLBACK[:] = [pruning(criterion=Interrupted(bins=16), schedule=STEPS)]
    saving = OnExceptionCheckpoint(tmp_path, "broken")
    with pytest.raises(SystemExit):
        trainer(CALLBACK[0], saving, enable_checkpointing=True).fit(OneNetwork(), loader(), loader(32, 1))
    callback = pruning(schedule=STEPS)
    trainer(callback).fit(OneNetwork(), loader(), loader(32, 1), ckpt_path=tmp_path / "broken.ckpt")
    assert [event["epoch"] for event in callback.events] == [2, 5]
    assert callback.stopped["reason"] == "budget"


def test_interrupt_while_a_rehearsed_cut_is_taken_back_leaves_the_model_whole(monkeypatch):
    did, told = Transaction.did, []

    def remember(self, inverse):
        told.append(inverse)
        pressed = len(told) == 6
        did(self, lambda: (signal.raise_signal(signal.SIGINT) if pressed else None, inverse()))

    monkeypatch.setattr(Transaction, "did", remember)
    model = nn.Sequential(nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 20), nn.ReLU(), nn.Linear(20, 4))
    before = dict(model.named_parameters())
    with pytest.raises(KeyboardInterrupt):
        Pruner(model, torch.randn(4, 16), criterion=Entropy(), budget=Budget(params=0.4))
    assert all(now is before[name] for name, now in model.named_parameters())
