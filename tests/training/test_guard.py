"""The quality guard: a step that costs too much is taken back; the run ends with the smallest network that kept the metric."""

import copy
import math
from collections import Counter

import pytest
import torch
from lightning import Callback
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint, StochasticWeightAveraging
from torch.nn import functional as F

from actprune.core.budget import Budget
from actprune.core.errors import ConfigError
from actprune.core.record import record_of
from actprune.criteria import Magnitude
from actprune.schedule import Schedule
from actprune.training.guard import Guard, direction
from actprune.training.snapshot import Snapshot
from foreign import OwnForward, loader

pytestmark = pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")


class Judged(OwnForward):
    """Logs a quality that is 1 while at least ``needed`` parameters are left, and falls with every one that is missing."""

    needed = 0

    def validation_step(self, batch, batch_idx):
        super().validation_step(batch, batch_idx)
        left = sum(p.numel() for p in self.parameters())
        self.log("quality", min(1.0, left / self.needed) if self.needed else 1.0)
        self.log("cost", max(0.0, 1 - left / self.needed) if self.needed else 0.0)


class Look(Callback):
    """Weights and moments at the end of every validation, and at the start of every epoch after the turn of pruning."""

    def __init__(self):
        self.after, self.before = {}, {}

    @staticmethod
    def state(trainer, pl_module):
        names = {id(p): n for n, p in pl_module.named_parameters()}
        moments = {
            f"{names[id(p)]}.{key}": value.clone()
            for optimizer in trainer.optimizers
            for p, held in optimizer.state.items()
            for key, value in held.items()
        }
        return {**{n: v.clone() for n, v in pl_module.state_dict().items()}, **moments}

    def on_validation_end(self, trainer, pl_module):
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self.after[trainer.current_epoch] = self.state(trainer, pl_module)

    def on_train_epoch_start(self, trainer, pl_module):
        self.before[trainer.current_epoch] = self.state(trainer, pl_module)


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())


def n_params(module):
    return sum(p.numel() for p in module.parameters())


WHOLE = 2172


@pytest.fixture
def guarded(pruning):
    def make(**options):
        defaults = {"schedule": Schedule("linear", start=0, interval=2, steps=5), "monitor": "quality", "mode": "max"}
        defaults |= {"max_metric_drop": 0.001, "budget": Budget(params=0.2), "criterion": Magnitude()}
        return pruning(**{**defaults, **options})

    return make


def run(module, callback, trainer, *others, **options):
    settings = {"max_epochs": 14, **options}
    fitted = trainer(callback, *others, **settings)
    fitted.fit(module, loader(), loader(32, 1))
    return fitted


def test_a_kept_metric_reaches_the_budget(guarded, trainer):
    module, callback = Judged(), guarded()
    run(module, callback, trainer)
    assert callback.stopped["reason"] == "budget"
    assert n_params(module) <= 0.2 * WHOLE
    assert callback.guard.lost == []
    assert callback.guard.snapshot is None


def test_a_step_that_costs_too_much_is_taken_back_with_everything(guarded, trainer, capsys):
    """Weights, buffers and moments are bit by bit what the validation before the step saw."""
    module, callback, look = Judged(), guarded(), Look()
    module.needed = WHOLE
    run(module, callback, trainer, look)
    cuts = [event["epoch"] for event in callback.events if not event.get("went_back")]
    backs = [event["epoch"] for event in callback.events if event.get("went_back")]
    assert cuts == [1, 5, 9]  # steps are due after epochs 0, 2, 4, 6, 8; every second one is spent on the verdict
    assert backs == [3, 7, 11]
    for cut, back in zip(cuts, backs, strict=True):
        assert same(look.before[back], look.after[cut - 1])
        assert not same(look.before[cut], look.after[cut - 1])
    assert n_params(module) == callback.pruner.params == WHOLE
    assert [round(lost["share"], 3) for lost in callback.guard.lost] == [0.2, 0.1, 0.05]
    assert not record_of(module)
    assert module.conv1.out_channels == module.norm.num_features == 12
    assert callback.stopped["reason"] == "metric"
    out = capsys.readouterr().out
    value = callback.guard.lost[0]["value"]
    assert f"quality {value:.4g} after recovery, 1 before, max_metric_drop=0.001: back to 2,172 parameters" in out
    assert out.count("back to 2,172 parameters") == 3
    assert "the budget params=0.2 was not reached" in " ".join(out.split())


def test_training_goes_on_after_the_way_back(guarded, trainer):
    """With the optimizer's moments, and with gradient hooks, of which wandb.watch registers one for every parameter."""
    module, callback, look, calls = Judged(), guarded(), Look(), Counter()
    module.needed = WHOLE
    for name, parameter in module.named_parameters():
        parameter.register_hook(lambda gradient, name=name: calls.update([name]))
    fitted = run(module, callback, trainer, look)
    assert calls == {name: fitted.global_step for name, _ in module.named_parameters()}
    held = [p for group in fitted.optimizers[0].param_groups for p in group["params"]]
    assert {id(p) for p in held} == {id(p) for p in module.parameters()}
    for name, value in look.before[13].items():
        if name.endswith("exp_avg"):
            assert not torch.equal(value, fitted.optimizers[0].state[module.get_parameter(name[: -len(".exp_avg")])]["exp_avg"])


class Unfrozen(Judged):
    """Trains its first layer from the epoch between a step and the way back on, in a group of its own."""

    def configure_optimizers(self):
        self.conv1.requires_grad_(False)
        return torch.optim.Adam([p for p in self.parameters() if p.requires_grad], lr=0.01)

    def on_train_epoch_start(self):
        if self.current_epoch == 2:
            self.conv1.requires_grad_(True)
            self.trainer.optimizers[0].add_param_group({"params": list(self.conv1.parameters())})


def test_layers_that_were_unfrozen_since_the_step_are_trained_on(guarded, trainer):
    module, callback, look = Unfrozen(), guarded(), Look()
    module.needed = WHOLE
    fitted = run(module, callback, trainer, look)
    assert [event["epoch"] for event in callback.events if event.get("went_back")][0] == 3
    assert same(look.before[3], look.after[0])
    first, second = ([id(p) for p in group["params"]] for group in fitted.optimizers[0].param_groups)
    late = [id(p) for p in module.conv1.parameters()]
    assert second == late
    assert first == [id(p) for p in module.parameters() if id(p) not in late]
    assert set(fitted.optimizers[0].state) == set(module.parameters())


@pytest.mark.parametrize("needed", [0.5, 0.75, 0.3])
def test_ends_with_the_smallest_network_it_found_that_kept_the_metric(needed, guarded, trainer):
    schedule = Schedule("linear", start=0, interval=1, steps=12)
    module, callback = Judged(), guarded(schedule=schedule)
    module.needed = needed * WHOLE
    run(module, callback, trainer)
    assert module.needed <= n_params(module) <= module.needed + 0.12 * WHOLE
    assert callback.guard.good < callback.guard.failed
    assert callback.stopped["reason"] == "metric"
    assert callback.history[-1]["quality"] == 1.0


def test_less_is_better_and_small_losses_do_not_add_up(guarded, trainer):
    """Every step of 8 points stays within 10, two together do not: the reference is the best value before a step."""
    module, callback = Judged(), guarded(monitor="cost", mode="min", max_metric_drop=0.20)
    module.needed = WHOLE
    run(module, callback, trainer)
    assert callback.guard.reference == 0.0
    assert callback.history[-1]["cost"] <= 0.20
    assert n_params(module) >= 0.8 * WHOLE
    assert [lost["reference"] for lost in callback.guard.lost] == [0.0] * len(callback.guard.lost)


def test_no_loss_is_a_limit_of_zero(guarded, pruning):
    assert guarded(stop="no_loss", max_metric_drop=None).max_metric_drop == 0.0
    assert guarded(stop="no_loss").max_metric_drop == 0.001
    assert pruning().max_metric_drop is None


def moment(checkpoint):
    """What a checkpoint waits for: a step to be taken, a verdict, the way back, or nothing; and how often it went back."""
    (state,) = [state for name, state in checkpoint["callbacks"].items() if name.startswith("PruningCallback")]
    guard = state["guard"]
    return bool(state["_plans"]), guard["trial"] is not None, guard["snapshot"] is not None, min(len(guard["lost"]), 2)


@pytest.mark.parametrize("at_train_end", [True, False])
def test_resume_is_exact_whatever_the_guard_waits_for(at_train_end, guarded, trainer, tmp_path):
    """Checkpoints with a step decided, a verdict awaited, a way back decided, and all of it over."""
    start = Judged()
    start.needed = 0.7 * WHOLE
    whole, full = copy.deepcopy(start), guarded()
    saved = ModelCheckpoint(tmp_path / "all", "{epoch}", save_top_k=-1, save_on_train_epoch_end=at_train_end)
    run(whole, full, trainer, saved, enable_checkpointing=True)
    assert full.guard.lost
    assert full.guard.good > 0
    moments = {}
    for epoch in range(13):
        path = tmp_path / "all" / f"epoch={epoch}.ckpt"
        moments.setdefault(moment(torch.load(path, weights_only=True)), path)
    assert len(moments) >= 5
    for kind, path in moments.items():
        resumed, callback = copy.deepcopy(start), guarded()
        trainer(callback, max_epochs=14).fit(resumed, loader(), loader(32, 1), ckpt_path=path)
        assert same(resumed.state_dict(), whole.state_dict()), kind
        assert callback.history == full.history
        assert callback.guard.lost == full.guard.lost
        assert callback.stopped == full.stopped


def test_a_verdict_at_the_end_of_training_leaves_the_good_network_everywhere(guarded, trainer, tmp_path):
    """In memory, in the last checkpoint of either kind, and as the best checkpoint."""
    module, look = Judged(), Look()
    module.needed = WHOLE
    callback = guarded(schedule=Schedule("one_shot", start=4))
    saved = ModelCheckpoint(tmp_path / "c", "{epoch}-{quality:.2f}", monitor="quality", mode="max", save_last=True)
    latest = ModelCheckpoint(tmp_path / "c", "latest", enable_version_counter=False, save_on_train_epoch_end=True)
    fitted = run(module, callback, trainer, saved, latest, look, max_epochs=6, enable_checkpointing=True)
    assert n_params(module) == WHOLE
    assert callback.stopped["reason"] == "metric"
    assert same({k: v for k, v in look.after[4].items() if k in module.state_dict()}, module.state_dict())
    for name in ("last", "latest"):
        last = torch.load(tmp_path / "c" / f"{name}.ckpt", weights_only=True)
        assert same(last["state_dict"], module.state_dict())
    assert saved.best_model_path.endswith("quality=1.00.ckpt")
    fresh = Judged()
    fresh.needed = WHOLE
    (found,) = fitted.validate(fresh, loader(32, 1), ckpt_path=saved.best_model_path, verbose=False)
    assert found["quality"] == 1.0


@pytest.mark.filterwarnings("ignore:Checkpoint directory")
@pytest.mark.parametrize("resumed", [False, True])
def test_a_way_back_in_mid_training_leaves_no_last_checkpoint_of_the_network_that_lost(resumed, guarded, trainer, tmp_path):
    """With ``save_last`` Lightning writes one beside the best ones only, and the good network was the best before the step."""
    start, path = Judged(), tmp_path / "c" / "last.ckpt"
    start.needed = WHOLE
    module, callback = copy.deepcopy(start), guarded(schedule=Schedule("one_shot", start=3))

    def checkpoints():
        every = ModelCheckpoint(tmp_path / "e", "{epoch}", save_top_k=-1, save_on_train_epoch_end=True)
        return every, ModelCheckpoint(tmp_path / "c", "{epoch}", monitor="quality", mode="max", save_last=True)

    run(module, callback, trainer, *checkpoints(), max_epochs=8, enable_checkpointing=True)
    assert [(event["epoch"], event.get("went_back", False)) for event in callback.events] == [(4, False), (6, True)]
    if resumed:
        path.write_bytes((tmp_path / "e" / "epoch=5.ckpt").read_bytes())  # as it was when the run was killed
        module, callback = copy.deepcopy(start), guarded(schedule=Schedule("one_shot", start=3))
        fitted = trainer(callback, *checkpoints(), max_epochs=8, enable_checkpointing=True)
        fitted.fit(module, loader(), loader(32, 1), ckpt_path=tmp_path / "e" / "epoch=6.ckpt")
    assert same(torch.load(path, weights_only=True)["state_dict"], module.state_dict())
    assert n_params(module) == WHOLE


def test_a_last_checkpoint_that_was_written_after_the_way_back_is_left_alone(guarded, trainer, tmp_path):
    module, callback = Judged(), guarded(schedule=Schedule("one_shot", start=3))
    module.needed = WHOLE
    seldom = ModelCheckpoint(tmp_path, "last", enable_version_counter=False, every_n_epochs=7, save_on_train_epoch_end=True)
    run(module, callback, trainer, seldom, max_epochs=8, enable_checkpointing=True)
    assert callback.events[-1]["epoch"] == 6
    assert torch.load(tmp_path / "last.ckpt", weights_only=True)["global_step"] == 7 * 6


@pytest.mark.filterwarnings("ignore:The dirpath has changed")
def test_a_run_resumed_elsewhere_leaves_the_checkpoints_of_its_origin_alone(guarded, trainer, tmp_path):
    start, schedule = Judged(), Schedule("one_shot", start=4)
    start.needed = WHOLE
    saved = ModelCheckpoint(tmp_path / "origin", "last", enable_version_counter=False, save_on_train_epoch_end=True)
    every = ModelCheckpoint(tmp_path / "all", "{epoch}", save_top_k=-1, monitor="quality", save_on_train_epoch_end=True)
    run(copy.deepcopy(start), guarded(schedule=schedule), trainer, saved, every, max_epochs=6, enable_checkpointing=True)
    before = (tmp_path / "origin" / "last.ckpt").read_bytes()
    module, other = copy.deepcopy(start), ModelCheckpoint(tmp_path / "other", "last", save_on_train_epoch_end=True)
    fitted = trainer(guarded(schedule=schedule), other, max_epochs=6, enable_checkpointing=True)
    fitted.fit(module, loader(), loader(32, 1), ckpt_path=tmp_path / "all" / "epoch=5.ckpt")
    assert n_params(module) == WHOLE
    assert (tmp_path / "origin" / "last.ckpt").read_bytes() == before


def test_killed_before_the_verdict_at_the_end(guarded, trainer, tmp_path):
    """The checkpoint of the last epoch holds the small network; resuming it still ends with the good one."""
    start = Judged()
    start.needed = WHOLE
    schedule = Schedule("one_shot", start=4)
    whole = copy.deepcopy(start)
    saved = ModelCheckpoint(tmp_path / "all", "{epoch}", save_top_k=-1)
    run(whole, guarded(schedule=schedule), trainer, saved, max_epochs=6, enable_checkpointing=True)
    path = tmp_path / "all" / "epoch=5.ckpt"
    assert len(torch.load(path, weights_only=True)["state_dict"]["conv1.weight"]) < 12
    resumed, callback = copy.deepcopy(start), guarded(schedule=schedule)
    trainer(callback, max_epochs=6).fit(resumed, loader(), loader(32, 1), ckpt_path=path)
    assert same(resumed.state_dict(), whole.state_dict())
    assert callback.stopped["reason"] == "metric"


def test_a_second_fit_knows_what_the_first_learnt(guarded, trainer):
    """What was lost, the reference, and a step without verdict where the first broke off; another trainer starts anew."""
    module, callback = Judged(), guarded()
    module.needed = WHOLE
    fitted = run(module, callback, trainer, max_steps=30)
    learnt = callback.guard
    assert learnt.failed is not None
    rows, lost = len(callback.history), list(learnt.lost)
    fitted.fit_loop.epoch_loop.max_steps = -1
    callback.max_metric_drop = 0.002
    fitted.fit(module, loader(), loader(32, 1))
    assert len(callback.history) > rows
    assert callback.guard.lost[: len(lost)] == lost
    assert max(new["share"] for new in callback.guard.lost[len(lost) :]) < learnt.failed
    assert callback.guard.reference == 1.0
    assert callback.guard.max_drop == 0.002
    assert n_params(module) == WHOLE
    assert callback.stopped["reason"] == "metric"
    run(Judged(), callback, trainer, max_epochs=10)
    assert callback.guard.lost == []


def test_a_second_fit_judges_the_step_in_whose_recovery_the_first_broke_off(guarded, trainer):
    class Break(Callback):
        broken = False

        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if trainer.current_epoch == 5 and not self.broken:
                self.broken = True
                raise RuntimeError("broken")

    module, callback = Judged(), guarded(schedule=Schedule("one_shot", start=4))
    module.needed = WHOLE
    fitted = trainer(callback, Break(), max_epochs=10)
    with pytest.raises(RuntimeError, match="broken"):
        fitted.fit(module, loader(), loader(32, 1))
    assert n_params(module) < WHOLE
    fitted.fit(module, loader(), loader(32, 1))
    assert n_params(module) == WHOLE
    assert [event.get("went_back", False) for event in callback.events] == [False, True]


def test_early_stopping_ends_the_recovery(guarded, trainer):
    class Stop(Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            trainer.should_stop = trainer.current_epoch == 1

    module, callback = Judged(), guarded()
    module.needed = WHOLE
    run(module, callback, trainer, Stop())
    assert n_params(module) == WHOLE
    assert callback.guard.lost[0]["epoch"] == 1  # which was validated; counted from 0, as everywhere


def test_early_stopping_compares_with_the_good_network_again(guarded, trainer):
    stop, seen = EarlyStopping("val_loss", patience=100), {}

    class Watch(Callback):
        def on_train_epoch_start(self, trainer, pl_module):
            seen[trainer.current_epoch] = float(stop.best_score)

    module = Judged()
    module.needed = WHOLE
    run(module, guarded(), trainer, stop, Watch())
    assert seen[1] == math.inf
    assert math.isfinite(seen[3])


def test_nan_is_a_loss(guarded, trainer):
    class Diverges(Judged):
        def validation_step(self, batch, batch_idx):
            super().validation_step(batch, batch_idx)
            self.log("score", float("nan") if n_params(self) < WHOLE else 1.0)

    module, callback = Diverges(), guarded(monitor="score")
    run(module, callback, trainer)
    assert n_params(module) == WHOLE
    assert callback.guard.lost


def lbfgs(parameters):
    return torch.optim.LBFGS(parameters, lr=0.01, max_iter=2, history_size=3)


OPTIMIZERS = {
    "adafactor": lambda p: torch.optim.Adafactor(p, lr=0.01),
    "sgd": lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9),
    "adamw fused": lambda p: torch.optim.AdamW(p, lr=0.01, fused=True),
    "adam amsgrad": lambda p: torch.optim.Adam(p, lr=0.01, amsgrad=True),
    "lbfgs": lbfgs,
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_snapshot_brings_every_optimizer_back(name, guarded, trainer):
    """After the way back the next epoch is the one that an uncut run would have had."""

    class Trained(Judged):
        def configure_optimizers(self):
            return OPTIMIZERS[name](self.parameters())

    torch.manual_seed(3)
    module, callback, look = Trained(), guarded(schedule=Schedule("one_shot", start=2)), Look()
    module.needed = WHOLE
    twin, plain = copy.deepcopy(module), Look()
    if name == "lbfgs":
        Look.state, state = staticmethod(lambda t, m: {n: v.clone() for n, v in m.state_dict().items()}), Look.state
    try:
        run(module, callback, trainer, look, max_epochs=10)
        trainer(plain, max_epochs=10).fit(twin, loader(), loader(32, 1))
    finally:
        if name == "lbfgs":
            Look.state = staticmethod(state)
    (back,) = [event["epoch"] for event in callback.events if event.get("went_back")]
    assert same(look.before[back], plain.before[3])
    assert same(look.after[back], plain.after[3])  # batches come in the same order every epoch


def test_snapshot_is_plain(guarded, trainer, tmp_path):
    module, callback = Judged(), guarded()
    fitted = run(module, callback, trainer)
    snapshot = Snapshot.take(fitted, callback._hooks)
    torch.save(snapshot.to_dict(), tmp_path / "s.pt")
    loaded = Snapshot.from_dict(torch.load(tmp_path / "s.pt", weights_only=True))
    assert same(loaded.values, snapshot.values)


# what cannot work says so


def test_metric_must_be_logged(guarded, trainer):
    with pytest.raises(ConfigError, match=r"watches 'acc', which validation did not log; it logged val_loss, val_acc"):
        run(OwnForward(), guarded(monitor="acc"), trainer)


def test_metric_must_be_named(guarded, trainer):
    with pytest.raises(ConfigError, match="max_metric_drop needs a metric to watch"):
        run(OwnForward(), guarded(monitor=None), trainer)


def test_metric_must_be_finite_before_a_step(guarded, trainer):
    class Broken(Judged):
        def validation_step(self, batch, batch_idx):
            super().validation_step(batch, batch_idx)
            self.log("score", float("inf"))

    with pytest.raises(ConfigError, match="score is inf before a pruning step"):
        run(Broken(), guarded(monitor="score"), trainer)


def test_stochastic_weight_averaging_is_refused(guarded, trainer):
    with pytest.raises(ConfigError, match="after the last verdict of max_metric_drop; use EMAWeightAveraging"):
        run(Judged(), guarded(), trainer, StochasticWeightAveraging(0.01))


def test_optimizers_must_train_parameters_of_the_module(guarded, trainer):
    class Elsewhere(Judged):
        def configure_optimizers(self):
            self.__dict__["secret"] = torch.nn.Linear(3, 3)
            return torch.optim.SGD([*self.parameters(), *self.__dict__["secret"].parameters()], lr=0.01)

    with pytest.raises(
        ConfigError, match=r"SGD trains 2 parameters that are no part of Elsewhere, the first of shape \(3, 3\)"
    ):
        run(Elsewhere(), guarded(), trainer)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"stop": "loss"}, "stop='loss' must be 'budget' or 'no_loss'"),
        ({"mode": "up"}, "mode='up' must be 'min', 'max' or None"),
        ({"max_metric_drop": -0.1}, "max_metric_drop=-0.1 must be at least 0"),
        ({"max_metric_drop": math.nan}, "max_metric_drop=nan must be at least 0"),
    ],
)
def test_arguments_are_checked(options, match, guarded):
    with pytest.raises(ConfigError, match=match):
        guarded(**options)


@pytest.mark.parametrize(
    ("name", "mode"),
    [("val/accuracy", "max"), ("val_loss", "min"), ("val/top1_acc", "max"), ("mIoU", "max"), ("rmse", "min"), ("dice", "max")],
)
def test_direction_from_the_name(name, mode, trainer):
    assert direction(name, None, trainer()) == mode


def test_direction_from_callbacks_or_the_user(trainer, tmp_path):
    saved = ModelCheckpoint(tmp_path, monitor="speed", mode="max")
    fitted = trainer(saved, enable_checkpointing=True)
    assert direction("speed", None, fitted) == "max"
    assert direction("speed", "min", fitted) == "min"
    with pytest.raises(ConfigError, match="cannot tell from the name 'goodness' whether more is better"):
        direction("goodness", None, fitted)
    with pytest.raises(ConfigError, match="cannot tell from the name 'loss_accuracy'"):
        direction("loss_accuracy", None, fitted)


def test_bisection_stops_where_it_is_not_worth_it():
    guard = Guard("x", 0.0, "max")
    assert guard.share(0.4) == 0.4
    guard.good, guard.failed = 0.4, 0.5
    assert guard.share(0.9) == pytest.approx(0.45)
    guard.good = 0.485
    assert guard.share(0.9) is None


def test_functional_metric_direction_is_used(guarded, trainer):
    """A cross entropy that rises is a loss, found from the name."""

    class Forgets(OwnForward):
        def validation_step(self, batch, batch_idx):
            x, y = batch
            narrow = self.conv1.out_channels < 12
            self.log("val_loss", F.cross_entropy(self(x), y) + 100 * narrow)

    module = Forgets()
    run(module, guarded(monitor="val_loss", mode=None, max_metric_drop=1.0), trainer)
    assert module.conv1.out_channels == 12
