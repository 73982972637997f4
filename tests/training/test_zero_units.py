"""Proximal training in Lightning: what became zero leaves at the steps of the schedule, nothing else does; training goes on."""

import pytest
import torch
from lightning import Callback
from lightning.pytorch.callbacks import ModelCheckpoint

from actprune import Budget, Selection
from actprune.criteria import Random, ZeroUnits
from actprune.schedule import Schedule
from actprune.sparsity import GroupLasso, ProxAdamW, unit_groups, zero_units
from foreign import OneNetwork, loader

EVERY = Schedule("linear", start=1, interval=2, steps=3)
ONE_STAYS = Selection(max_ratio=0.99)


class Proximal(OneNetwork):
    """Our task with a proximal optimizer that was told nothing of units."""

    def configure_optimizers(self):
        return ProxAdamW(self.parameters(), lr=0.01, penalty=GroupLasso(self.lam))


class Watch(Callback):
    """Between decision and cut: which units are zero, and what the network says; after the first step: the units shrunk."""

    def __init__(self, pruning):
        self.pruning, self.zeros, self.said, self.units = pruning, [], [], []
        self.x = next(iter(loader(32, 1)))[0]

    def on_validation_end(self, trainer, module):
        if trainer.sanity_checking:
            return
        pruner = self.pruning.pruner
        found = zero_units(unit_groups(pruner.model, pruner.graph))
        self.zeros.append({name: int(zero.sum()) for name, zero in found.items()})
        self.before = self.outputs(module)

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        if batch_idx == 0 and trainer.current_epoch:
            self.said.append(float((self.outputs(module) - self.before).abs().max()))

    def on_train_batch_end(self, trainer, module, *_):
        self.units.append({group.name: group.size for group in trainer.optimizers[0].groups})

    def outputs(self, module):
        module.eval()
        with torch.no_grad():
            said = module.model(self.x)
        module.train()
        return said


def run(pruning, trainer, lam=6e-4, **options):
    callback = pruning(schedule=EVERY, selection=ONE_STAYS, compensation=None, **options)
    watch, module = Watch(callback), Proximal()
    module.lam = lam
    trainer(callback, watch, max_epochs=8).fit(module, loader(), loader(32, 1))
    return callback, watch, module


def test_exactly_the_zero_units_leave_when_a_step_is_due(pruning, trainer):
    callback, watch, _ = run(pruning, trainer, criterion=ZeroUnits(), budget=Budget(params=0.01))
    cuts = {event["epoch"] - 1: event["widths"] for event in callback.events}
    assert cuts
    assert set(cuts) <= {1, 3, 5}
    for epoch in (1, 3, 5):
        expected = {name: n for name, n in watch.zeros[epoch].items() if n}
        assert {name: before - after for name, (before, after) in cuts.get(epoch, {}).items()} == expected
    assert max(watch.said) < 1e-5
    assert callback.stopped["reason"] == "threshold"
    assert "scored at most 0; " in callback.stopped["message"]


def test_the_optimizer_shrinks_the_units_that_are_there(pruning, trainer):
    callback, watch, module = run(pruning, trainer, criterion=ZeroUnits(), budget=Budget(params=0.01))
    widths = {name: before for name, before, _ in callback.pruner.widths()}
    assert watch.units[0] == widths
    for event in callback.events:
        widths |= {name: after for name, (_, after) in event["widths"].items()}
    assert watch.units[-1] == widths == {name: after for name, _, after in callback.pruner.widths()}
    held = {id(p) for p in module.parameters()}
    assert all(id(piece.param) in held for group in module.optimizers().groups for piece in group.pieces)


def test_the_budget_is_a_limit(pruning, trainer):
    callback, watch, _ = run(pruning, trainer, criterion=ZeroUnits(), budget=Budget(params=0.8))
    assert callback.pruner.params >= 0.8 * callback.pruner.params_before
    assert callback.pruner.params < callback.pruner.params_before
    assert sum(watch.zeros[-1].values()) > 0


def test_without_zeros_nothing_leaves(pruning, trainer):
    callback, _, _ = run(pruning, trainer, lam=0.0, criterion=ZeroUnits(), budget=Budget(params=0.01))
    assert callback.events == []
    assert "100.0% of the params remain, the limit was 1.0%" in callback.stopped["message"]


class Chosen(OneNetwork):
    """Units are chosen where the optimizer is made, as the library's users do."""

    def configure_optimizers(self):
        from actprune import trace

        units = unit_groups(self.model, trace(self.model, torch.zeros(2, 3, 8, 8)))
        return ProxAdamW(self.parameters(), lr=0.01, penalty=GroupLasso(1e-6), groups=units)


@pytest.mark.parametrize("drop", [None, 0.0])
def test_chosen_units_follow_any_criterion_and_the_way_back(drop, pruning, trainer):
    """A guard with mode=max on a loss takes every step back after which the loss fell."""
    callback = pruning(
        criterion=Random(), budget=Budget(params=0.3), schedule=EVERY, monitor="val_loss", max_metric_drop=drop, mode="max"
    )
    module = Chosen()
    trainer(callback, max_epochs=8).fit(module, loader(), loader(32, 1))
    assert any("went_back" in event for event in callback.events) == (drop is not None)
    groups = module.optimizers().groups
    assert {group.name: group.size for group in groups} == {name: after for name, _, after in callback.pruner.widths()}
    held = {id(p) for p in module.parameters()}
    assert all(id(piece.param) in held for group in groups for piece in group.pieces)


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
def test_a_resumed_run_goes_on_exactly(pruning, trainer, tmp_path):
    def fit(ckpt_path=None):
        module = Proximal()
        module.lam = 6e-4
        callback = pruning(
            criterion=ZeroUnits(), budget=Budget(params=0.01), schedule=EVERY, selection=ONE_STAYS, compensation=None
        )
        keep = ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1)
        trainer(callback, keep, max_epochs=8, enable_checkpointing=True).fit(
            module, loader(), loader(32, 1), ckpt_path=ckpt_path
        )
        return module, callback

    whole, first = fit()
    resumed, second = fit(tmp_path / "epoch=3.ckpt")
    assert first.events
    assert [{**event, "seconds": None} for event in second.events] == [{**event, "seconds": None} for event in first.events]
    for ours, theirs in zip(resumed.parameters(), whole.parameters(), strict=True):
        assert torch.equal(ours, theirs)
