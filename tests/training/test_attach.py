"""The callback on LightningModules that know nothing of it."""

import inspect
import re
from collections import defaultdict

import pytest
import torch
from lightning import Callback

from actprune.compensation import Mean
from actprune.core.budget import Budget
from actprune.core.errors import ActPruneError, BudgetError, ConfigError, ObservationError
from actprune.criteria import Magnitude
from actprune.schedule import Schedule
from actprune.training import PruningCallback
from foreign import OneNetwork, OwnForward, SeveralParts, loader

KINDS = [
    (OwnForward, "", {"conv1", "conv2"}, loader),
    (OneNetwork, "model", {"0", "4"}, loader),
    (SeveralParts, "", {"encoder.0", "encoder.2"}, SeveralParts.loader),
]


def n_params(module):
    return sum(p.numel() for p in module.parameters())


@pytest.mark.parametrize("sanity", [2, 0])
@pytest.mark.parametrize(("kind", "path", "groups", "load"), KINDS)
def test_finds_and_prunes_the_network(kind, path, groups, load, sanity, pruning, trainer):
    module, callback = kind(), pruning()
    before = n_params(module)
    trainer(callback, num_sanity_val_steps=sanity).fit(module, load(), load(32, 1))
    assert callback.pruner.model is module.get_submodule(path)
    assert {name for name, _, _ in callback.pruner.widths()} == groups
    assert callback.pruner.params_before == before
    assert callback.pruner.params == n_params(module) <= 0.4 * before
    assert all(torch.isfinite(p).all() for p in module.parameters())


def test_kwargs_and_mixed_arguments(pruning, trainer):
    class Keywords(OwnForward):
        def forward(self, x, *, scale):
            return super().forward(x * scale)

        def training_step(self, batch, batch_idx):
            return torch.nn.functional.cross_entropy(self(batch[0], scale=torch.ones(1)), batch[1])

        def validation_step(self, batch, batch_idx):
            self(batch[0], scale=torch.ones(1))

    module, callback = Keywords(), pruning()
    before = n_params(module)
    trainer(callback).fit(module, loader(), loader(32, 1))
    assert n_params(module) <= 0.4 * before


def test_example_is_one_sample(pruning, trainer):
    callback = pruning()
    trainer(callback, max_epochs=2).fit(OwnForward(), loader(), loader(32, 1))
    (x,) = callback.pruner.example_inputs
    assert x.shape == (1, 3, 8, 8)
    assert torch.equal(x, loader(32, 1).dataset[0][0][None])


class Spy(Callback):
    """Counts the hooks that are on while validation batches run."""

    def __init__(self):
        self.hooks = {}

    def on_validation_batch_end(self, trainer, pl_module, *args):
        if trainer.sanity_checking:
            return
        n = sum(len(m._forward_pre_hooks) + len(m._forward_hooks) + ("forward" in vars(m)) for m in pl_module.modules())
        self.hooks.setdefault(trainer.current_epoch, set()).add(n)


def test_hooks_only_where_a_step_is_due(pruning, trainer):
    module, spy = OneNetwork(), Spy()
    trainer(pruning(schedule=Schedule("linear", start=1, interval=2, steps=2)), spy).fit(module, loader(), loader(32, 1))
    assert {epoch for epoch, counts in spy.hooks.items() if counts != {0}} == {1, 3}
    assert not any(m._forward_pre_hooks or m._forward_hooks or "forward" in vars(m) for m in module.modules())
    assert "log" not in vars(module)


def test_replaying_the_step_leaves_no_trace(pruning, trainer, list_logger):
    """Counters, lists and metrics that validation_step fills hold what validation put there; loggers hear of nothing else."""

    class Checked(SeveralParts):
        seen = None

        def __init__(self):
            super().__init__()
            self.outputs, self._kept, self.calls = defaultdict(list), [], 0

        def validation_step(self, batch, batch_idx):
            self.calls += 1
            self.outputs["val"].append(batch_idx)
            self._kept.append(batch_idx)
            self.logger.log_metrics({"picture": 1.0})
            return super().validation_step(batch, batch_idx)

        def on_validation_epoch_end(self):
            self.seen = (len(self.losses), int(self.accuracy._update_count))
            super().on_validation_epoch_end()

    module = Checked()
    options = {"max_epochs": 4, "num_sanity_val_steps": 0, "logger": [list_logger], "log_every_n_steps": 1}
    trainer(pruning(), **options).fit(module, module.loader(), module.loader(48, 1))
    assert module.seen == (3, 3)
    assert module.calls == 12
    assert module.outputs == {"val": module._kept}
    assert module._kept == 4 * [0, 1, 2]
    assert sum("picture" in content for _, content in list_logger.calls) == 12


def test_optimizer_goes_on(pruning, trainer):
    """After the last cut every parameter still moves, and the optimizer holds exactly the module's parameters."""
    module, callback = OwnForward(), pruning()
    last = {}

    class Snapshot(Callback):
        def on_train_epoch_start(self, trainer, pl_module):
            last.clear()
            last.update({name: p.detach().clone() for name, p in pl_module.named_parameters()})

    fitted = trainer(callback, Snapshot())
    fitted.fit(module, loader(), loader(32, 1))
    now = dict(module.named_parameters())
    assert {id(p) for group in fitted.optimizers[0].param_groups for p in group["params"]} == {id(p) for p in now.values()}
    for name, p in now.items():
        assert not torch.equal(p, last[name]), name
        assert fitted.optimizers[0].state[p]["exp_avg"].shape == p.shape


def test_steps_are_delayed_to_the_next_validation(pruning, trainer):
    callback = pruning(schedule=Schedule("linear", start=0, interval=1, steps=2))
    trainer(callback, check_val_every_n_epoch=2).fit(OwnForward(), loader(), loader(32, 1))
    assert [(row["epoch"], row["step"]) for row in callback.history] == [(1, 0), (3, 1), (5, 1)]
    assert callback.pruner.params <= 0.4 * callback.pruner.params_before


def test_one_decision_per_epoch_with_several_validations(pruning, trainer):
    callback = pruning(schedule=Schedule("linear", start=1, interval=1, steps=2))
    trainer(callback, val_check_interval=0.5).fit(OwnForward(), loader(), loader(32, 1))
    assert [row["step"] for row in callback.history] == [0, 0, 0, 0, 1, 1, 2, 2, 2, 2, 2, 2]


def test_fast_dev_run_traces_and_prunes_nothing(pruning, trainer):
    module, callback = OwnForward(), pruning()
    before = n_params(module)
    trainer(callback, fast_dev_run=True).fit(module, loader(), loader(32, 1))
    assert callback.pruner.params == n_params(module) == before


def test_says_when_training_ends_too_early(pruning, trainer, capsys):
    class Stop(Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            trainer.should_stop = True

    trainer(pruning(), Stop()).fit(OwnForward(), loader(), loader(32, 1))
    assert "budget params=0.4 was not reached" in capsys.readouterr().out


def test_one_console_line_per_step(pruning, trainer, capsys):
    schedule = Schedule("linear", start=0, interval=1, steps=2)
    trainer(pruning(schedule=schedule)).fit(OwnForward(), loader(), loader(32, 1))
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("pruning step")]
    assert len(lines) == 2
    form = r"pruning step 1, before epoch 2: params [\d,]+ \([\d.]+%\), MACs [\d.]+k \([\d.]+%\), 2 groups, [\d.]+ s"
    assert re.fullmatch(form, lines[0])


# what cannot work is refused before the first training step


class Untouched(Callback):
    steps = 0

    def on_train_batch_start(self, *args):
        self.steps += 1


class Linear(OwnForward):
    def __init__(self):
        super().__init__()
        self.fc = torch.nn.Linear(192, 4)
        del self.conv1, self.conv2, self.norm

    def forward(self, x):
        return self.fc(x.flatten(1))


REFUSED = {
    "no loader": (OwnForward, {}, {}, None, ConfigError, "observes activations in validation"),
    "limited away": (OwnForward, {}, {"limit_val_batches": 0}, loader(), ConfigError, "limit_val_batches=0"),
    "no batches": (OwnForward, {}, {}, [], ConfigError, "validation has no batch"),
    "out of reach": (OwnForward, {"budget": Budget(params=0.001)}, {}, loader(), BudgetError, "budget"),
    "nothing to cut": (Linear, {}, {}, loader(), BudgetError, "no group whose units may leave"),
    "one epoch": (OwnForward, {}, {"max_epochs": 1}, loader(), ConfigError, "max_epochs=1"),
    "endless": (OwnForward, {}, {"max_epochs": -1, "max_steps": 20}, loader(), ConfigError, "max_epochs=-1"),
    "no validation in time": (
        OwnForward,
        {},
        {"check_val_every_n_epoch": 6},
        loader(),
        ConfigError,
        "validate more often",
    ),
}


@pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`")
@pytest.mark.filterwarnings("ignore:Total length of `list` across ranks is zero")
@pytest.mark.parametrize("sanity", [2, 0])
@pytest.mark.parametrize("case", REFUSED)
def test_refused_before_training(case, sanity, pruning, trainer):
    kind, options, settings, val, error, match = REFUSED[case]
    untouched = Untouched()
    with pytest.raises(error, match=match):
        trainer(pruning(**options), untouched, num_sanity_val_steps=sanity, **settings).fit(kind(), loader(), val)
    assert untouched.steps == 0


@pytest.mark.parametrize("strategy", ["FSDPStrategy", "DeepSpeedStrategy", "ModelParallelStrategy"])
def test_sharding_strategies_are_refused(strategy, pruning, monkeypatch, trainer):
    fitted = trainer(pruning())
    sharded = type(strategy, (), {"root_device": torch.device("cpu")})
    monkeypatch.setattr(type(fitted), "strategy", sharded())
    with pytest.raises(ConfigError, match=f'{strategy} holds; prune on one device or with strategy="ddp"'):
        fitted.callbacks[0].setup(fitted, OwnForward(), "fit")


def test_a_trainer_of_the_other_package_is_refused(pruning):
    foreign = type("Trainer", (), {"__module__": "pytorch_lightning.trainer"})()
    with pytest.raises(ConfigError, match="the trainer is a pytorch_lightning.trainer.Trainer, .* write `import lightning"):
        pruning().setup(foreign, OwnForward(), "fit")


def test_processes_that_end_before_the_network_is_used_are_refused(pruning, trainer):
    fitted = trainer(pruning(), devices=2, strategy="ddp_fork")
    with pytest.raises(
        ConfigError, match=r'never pruned; use strategy=actprune.training.SpawnedDDP\("fork"\), or strategy="ddp"'
    ):
        fitted.callbacks[0].setup(fitted, OwnForward(), "fit")


def test_bad_activations_stop_training_with_the_place(pruning, trainer):
    class Broken(OneNetwork):
        def validation_step(self, batch, batch_idx):
            images = torch.full_like(batch[0], float("nan")) if self.current_epoch == 1 else batch[0]
            self.model(images)

    with pytest.raises(ObservationError):
        trainer(pruning(schedule=Schedule(start=1))).fit(Broken(), loader(), loader(32, 1))


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"criterion": "entropy"}, "criterion must be a Criterion"),
        ({"budget": 0.4}, "budget must be a Budget"),
        ({"compensation": "least_squares"}, "compensation='least_squares' must be 'mean'"),
    ],
)
def test_arguments_are_checked(options, match, pruning):
    with pytest.raises(ActPruneError, match=match):
        pruning(**options)


def test_criterion_without_activations_and_without_compensation(pruning, trainer):
    module = OwnForward()
    before = n_params(module)
    trainer(pruning(criterion=Magnitude(), compensation=None)).fit(module, loader(), loader(32, 1))
    assert n_params(module) <= 0.4 * before


def test_defaults_are_plain_values(pruning):
    """LightningCLI writes them into the config file of a run and reads them from there."""
    defaults = {p.default for p in inspect.signature(PruningCallback).parameters.values()} - {inspect.Parameter.empty}
    assert all(value is None or isinstance(value, (str, int, float)) for value in defaults)
    assert isinstance(pruning().compensation, Mean)
