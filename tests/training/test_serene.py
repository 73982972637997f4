"""SeReNe in Lightning: the decay is the library's, the stage keeps its promise, and what users combine with it works."""

import copy
import warnings

import pytest
import torch
from lightning import Callback, LightningModule
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.nn import functional as F

import ddp_runs
from actprune import Budget, Schedule, Selection
from actprune.core.errors import ConfigError, ObservationError
from actprune.criteria import ZeroUnits
from actprune.sparsity import InsensitivityDecay
from actprune.training import SeReNe
from foreign import OneNetwork, OwnForward, SeveralParts, loader

SOME = Schedule("linear", start=1, interval=2, steps=2)
ONE_STAYS = Selection(max_ratio=0.99)


def serene(**options):
    options = {"schedule": SOME, "selection": ONE_STAYS, "decay": 0.02, "sensitivity": "lower_bound", **options}
    return SeReNe(options.pop("budget", Budget(params=0.01)), **options)


class Plain(OneNetwork):
    """SGD, whose steps a loop by hand repeats."""

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)


@pytest.mark.parametrize("accumulate", [1, 4])
@pytest.mark.parametrize("sensitivity", ["full", "lower_bound", "local"])
def test_every_optimizer_step_is_followed_by_the_decay(sensitivity, accumulate, trainer):
    module = Plain()
    model = copy.deepcopy(module.model)
    nothing_leaves = Selection(max_ratio=0.0)
    callback = serene(sensitivity=sensitivity, decay=0.1, selection=nothing_leaves, schedule=Schedule("one_shot", start=0))
    trainer(callback, max_epochs=2, accumulate_grad_batches=accumulate, limit_train_batches=5).fit(
        module, loader(), loader(32, 1)
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    decay = InsensitivityDecay(model, callback.pruner.graph, 0.1, sensitivity)
    batches = list(loader())[:5]
    model.train()
    for _ in range(2):
        for number, (x, y) in enumerate(batches):
            with decay.watching():
                loss = F.cross_entropy(model(x), y)
            (loss / accumulate).backward()
            if (number + 1) % accumulate == 0 or number == len(batches) - 1:
                optimizer.step()
                optimizer.zero_grad()
                decay.step()
    for ours, theirs in zip(module.model.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7)


class Losses(Callback):
    """Validation loss by hand: right after the decision, and again once the cut is made."""

    def __init__(self, pruning):
        self.pruning, self.decided, self.cut, self.refused = pruning, {}, {}, {}

    def loss(self, module):
        module.eval()
        with torch.no_grad():
            total = sum(float(F.cross_entropy(module.model(x), y)) * len(y) for x, y in loader(40, 1))
        module.train()
        return total / 40

    def on_validation_end(self, trainer, module):
        if not trainer.sanity_checking:
            self.decided[trainer.current_epoch] = self.loss(module)

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        if batch_idx == 0:
            self.cut[trainer.current_epoch - 1] = self.loss(module)


@pytest.mark.parametrize("tolerance", [0.0, 0.5])
def test_a_stage_costs_at_most_what_is_tolerated(tolerance, trainer):
    callback = serene(tolerance=tolerance)
    losses = Losses(callback)
    trainer(callback, losses, max_epochs=7).fit(OneNetwork(), loader(), loader(40, 1))
    assert [stage["epoch"] for stage in callback.stages] == [1, 3]
    assert callback.events
    for stage in callback.stages:
        before, after = losses.decided[stage["epoch"]], losses.cut[stage["epoch"]]
        assert stage["loss_before"] == pytest.approx(before, rel=1e-5)
        assert stage["loss_after"] == pytest.approx(after, rel=1e-5)
        assert after <= before * (1 + tolerance) * (1 + 1e-5)
        assert stage["tried"] <= 5  # of 28 units
    assert callback.stopped["reason"] == "threshold"


class Last(Callback):
    """The state in which a stage decided, to decide once more by trying every threshold."""

    def on_validation_end(self, trainer, module):
        if trainer.current_epoch == 1 and not trainer.sanity_checking:
            self.model = copy.deepcopy(module.model)


def test_the_threshold_is_the_largest_one(trainer):
    from actprune import Pruner

    callback = serene(tolerance=0.3, compensation=None, schedule=Schedule("one_shot", start=1))
    last = Last()
    trainer(callback, last, max_epochs=4).fit(OneNetwork(), loader(), loader(40, 1))
    (stage,) = callback.stages

    def loss(threshold):
        model = copy.deepcopy(last.model).eval()
        pruner = Pruner(model, torch.zeros(2, 3, 8, 8), ZeroUnits(threshold), Budget(params=0.01), ONE_STAYS, None)
        plan = pruner.plan(None)
        if plan is not None:
            pruner.execute(plan)
        with torch.no_grad():
            return sum(float(F.cross_entropy(model(x), y)) * len(y) for x, y in loader(40, 1)) / 40

    scores = Pruner(last.model, torch.zeros(2, 3, 8, 8), ZeroUnits(), Budget(params=0.01), ONE_STAYS, None).scores(None)
    candidates = torch.cat(list(scores.values())).unique().tolist()
    assert loss(stage["threshold"]) == pytest.approx(stage["loss_after"], rel=1e-5)
    following = next(t for t in candidates if t > stage["threshold"])
    assert loss(following) > 1.3 * stage["loss_before"]
    gone = sum(before - after for before, after in callback.events[0]["widths"].values())
    assert gone == candidates.index(stage["threshold"]) + 1


TRAINERS = {
    "bf16-mixed": {"precision": "bf16-mixed"},
    "16-mixed": {"precision": "16-mixed"},
    "64-true": {"precision": "64-true"},
    "clipping": {"gradient_clip_val": 0.5},
    "no sanity check": {"num_sanity_val_steps": 0},
    "some validation batches": {"limit_val_batches": 1},
    "inference mode off": {"inference_mode": False},
}


@pytest.mark.parametrize("name", TRAINERS)
def test_trainer_settings(name, trainer):
    module, callback = OneNetwork(), serene(tolerance=0.5)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Bfloat16|.*bf16")
        trainer(callback, max_epochs=6, **TRAINERS[name]).fit(module, loader(), loader(32, 1))
    assert callback.events
    assert all(torch.isfinite(p).all() for p in module.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in module.modules())


class Frozen(OneNetwork):
    """Fine-tuning: the first layer stays."""

    def configure_optimizers(self):
        self.model[0].requires_grad_(False)
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=0.01)


def test_frozen_layers_stay_as_they_are(trainer):
    module, callback = Frozen(), serene(decay=0.1)
    before = module.model[0].weight.detach().clone()
    trainer(callback, max_epochs=5).fit(module, loader(), loader(32, 1))
    kept = module.model[0].weight.detach()
    rows = {tuple(row.flatten().tolist()) for row in before}
    assert all(tuple(row.flatten().tolist()) in rows for row in kept)


def test_networks_as_other_people_write_them(trainer):
    own, callback = OwnForward(), serene(tolerance=0.5, monitor="val_loss")
    trainer(callback, max_epochs=6).fit(own, loader(), loader(32, 1))
    assert callback.events
    several, parts = SeveralParts(), serene(tolerance=0.5, modules=["encoder"])
    trainer(parts, max_epochs=6).fit(several, SeveralParts.loader(), SeveralParts.loader(32, 1))
    assert parts.stages
    with pytest.raises(ObservationError, match="training ran no SeveralParts whose outputs depend on a pre-activation"):
        trainer(serene(), max_epochs=6).fit(SeveralParts(), SeveralParts.loader(), SeveralParts.loader(32, 1))


def test_the_loss_may_be_given(trainer):
    callback = serene(loss=lambda module, batch: F.cross_entropy(module.model(batch[0]), batch[1]) + 2)
    trainer(callback, max_epochs=5).fit(OneNetwork(), loader(), loader(32, 1))
    assert all(stage["loss_before"] > 2 for stage in callback.stages)


class Manual(OneNetwork):
    """Steps by itself."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False


def test_what_cannot_work_is_refused(trainer):
    with pytest.raises(ConfigError, match=r"SeReNe judges thresholds by .* and Manual steps its optimizers itself .* loss="):
        trainer(serene()).fit(Manual(), loader(), loader(32, 1))
    for options, match in (
        ({"decay": -1.0}, r"decay=-1.0 must lie in \[0, 1\]"),
        ({"sensitivity": "half"}, "sensitivity='half' is not known"),
        ({"tolerance": -0.1}, "tolerance=-0.1 must be at least 0"),
    ):
        with pytest.raises(ConfigError, match=match):
            serene(**options)


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
def test_a_resumed_run_goes_on_exactly(trainer, tmp_path):
    def fit(ckpt_path=None):
        module, callback = OneNetwork(), serene(tolerance=0.3)
        keep = ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1)
        trainer(callback, keep, max_epochs=6, enable_checkpointing=True).fit(
            module, loader(), loader(32, 1), ckpt_path=ckpt_path
        )
        return module, callback

    whole, first = fit()
    resumed, second = fit(tmp_path / "epoch=1.ckpt")
    assert first.events
    assert [{**s, "seconds": None} for s in second.stages] == [{**s, "seconds": None} for s in first.stages]
    for ours, theirs in zip(resumed.parameters(), whole.parameters(), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("sensitivity", ["full", "local"])
def test_two_processes_with_half_the_batch_are_one(sensitivity, tmp_path):
    zero, one = ddp_runs.start(tmp_path, "two", devices=2, serene=sensitivity)
    (alone,) = ddp_runs.start(tmp_path, "one", devices=1, serene=sensitivity)
    assert ddp_runs.same(zero, one)
    ddp_runs.assert_close(zero, alone)
    assert zero["events"]


class Digits(LightningModule):
    """LeNet-300 on the digits."""

    def __init__(self):
        super().__init__()
        hidden = (nn.Linear(64, 300), nn.ReLU(), nn.Linear(300, 100), nn.ReLU())
        self.net = nn.Sequential(nn.Flatten(), *hidden, nn.Linear(100, 10))

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def validation_step(self, batch, batch_idx):
        self.log("accuracy", (self.net(batch[0]).argmax(1) == batch[1]).float().mean())

    test_step = validation_step

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-3)
