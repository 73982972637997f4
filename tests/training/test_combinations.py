"""What users combine with pruning: precisions, schedulers, clipping, accumulation, averages, callbacks; each really trains."""

import copy
import warnings

import pytest
import torch
from lightning import Callback
from lightning.pytorch.callbacks import (
    BackboneFinetuning,
    EarlyStopping,
    GradientAccumulationScheduler,
    LearningRateMonitor,
    ModelCheckpoint,
    StochasticWeightAveraging,
)
from torch import nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import OneCycleLR, ReduceLROnPlateau

from actprune.schedule import Schedule
from averaging import averaging
from foreign import CLASSES, OneNetwork, OwnForward, loader

pytestmark = [
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`"),
    pytest.mark.filterwarnings("ignore:.*lr_scheduler.step.*optimizer.step"),
]


def n_params(module):
    return sum(p.numel() for p in module.parameters())


def pruned_and_trained(module, whole):
    return n_params(module) <= 0.4 * whole and all(torch.isfinite(p).all() for p in module.parameters())


TRAINERS = {
    "accumulation": {"accumulate_grad_batches": 4},
    "clipping by norm": {"gradient_clip_val": 0.5},
    "clipping by value": {"gradient_clip_val": 0.1, "gradient_clip_algorithm": "value"},
    "bf16-mixed": {"precision": "bf16-mixed"},
    "16-mixed": {"precision": "16-mixed"},
    "bf16-true": {"precision": "bf16-true"},
    "64-true": {"precision": "64-true"},
    "some validation batches": {"limit_val_batches": 1},
    "share of validation": {"limit_val_batches": 0.5},
    "several validations per epoch": {"val_check_interval": 0.5},
    "validation after batches": {"val_check_interval": 3},
    "validation every other epoch": {"check_val_every_n_epoch": 2},
    "no sanity check": {"num_sanity_val_steps": 0},
    "whole sanity check": {"num_sanity_val_steps": -1},
    "inference mode off": {"inference_mode": False},
    "anomalies": {"detect_anomaly": True},
    "loaders made anew": {"reload_dataloaders_every_n_epochs": 1},
    "few training batches": {"limit_train_batches": 2},
    "barebones": {"barebones": True, "logger": None, "enable_checkpointing": None},
}


@pytest.mark.parametrize("name", TRAINERS)
def test_trainer_settings(name, pruning, trainer):
    options = {"max_epochs": 8, **TRAINERS[name]}
    module, callback = OneNetwork(), pruning()
    whole = n_params(module)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "You are running in")
        warnings.filterwarnings("ignore", "Bfloat16|.*bf16|.*barebones=True")
        trainer(callback, **options).fit(module, loader(), loader(32, 1))
    assert pruned_and_trained(module, whole)
    assert callback.stopped["reason"] == "budget"


@pytest.mark.parametrize("whole_module", [True, False])
def test_compiled(whole_module, pruning, trainer):
    module, callback = OneNetwork(), pruning()
    before = n_params(module)
    module.model.compile(backend="eager") if not whole_module else module.compile(backend="eager")
    trainer(callback, max_epochs=4).fit(module, loader(), loader(32, 1))
    assert pruned_and_trained(module, before)


@pytest.mark.parametrize("sanity", [0, 1])
def test_a_compiled_lightning_module(sanity, pruning, trainer):
    module, callback = OneNetwork(), pruning()
    before = n_params(module)
    trainer(callback, max_epochs=4, num_sanity_val_steps=sanity).fit(
        torch.compile(module, backend="eager"), loader(), loader(32, 1)
    )
    assert pruned_and_trained(module, before)


def test_wrapped_by_torch_compile(pruning, trainer):
    module, callback = OneNetwork(), pruning()
    module.model = torch.compile(module.model, backend="eager")
    before = n_params(module)
    trainer(callback, max_epochs=4).fit(module, loader(), loader(32, 1))
    assert pruned_and_trained(module, before)


def test_a_compiled_network_is_compiled_after_every_step(pruning, trainer):
    ran = []

    def backend(graph, inputs):
        def run(*arguments):
            ran.append(module.current_epoch)
            return graph(*arguments)

        return run

    module, callback = OneNetwork(), pruning(schedule=Schedule("linear", start=1, interval=1, steps=9))
    module.model = torch.compile(module.model, backend=backend)
    trainer(callback, max_epochs=12).fit(module, loader(), loader(32, 1))
    assert len(callback.events) == 9
    assert all(ran.count(epoch) >= 6 for epoch in range(12))  # the batches of training


class Groups(OneNetwork):
    """Two parameter groups, and a scheduler that steps with every batch."""

    def configure_optimizers(self):
        decayed = [p for p in self.parameters() if p.dim() > 1]
        others = [p for p in self.parameters() if p.dim() <= 1]
        groups = [{"params": decayed, "weight_decay": 0.1, "lr": 0.01}, {"params": others, "weight_decay": 0.0, "lr": 0.02}]
        optimizer = torch.optim.AdamW(groups)
        scheduler = OneCycleLR(optimizer, max_lr=[0.01, 0.02], total_steps=self.trainer.estimated_stepping_batches)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def test_parameter_groups_and_a_scheduler_per_step(pruning, trainer):
    module, callback, rates = Groups(), pruning(), []
    plain = copy.deepcopy(module)

    class Rates(Callback):
        def on_train_batch_end(self, trainer, pl_module, *args):
            rates.append([group["lr"] for group in trainer.optimizers[0].param_groups])

    whole = n_params(module)
    fitted = trainer(callback, Rates())
    fitted.fit(module, loader(), loader(32, 1))
    assert pruned_and_trained(module, whole)
    sizes = [{p.dim() > 1 for p in group["params"]} for group in fitted.optimizers[0].param_groups]
    assert sizes == [{True}, {False}]
    pruned_rates = rates[:]
    rates.clear()
    trainer(Rates()).fit(plain, loader(), loader(32, 1))
    assert rates == pruned_rates


class Frozen(OneNetwork):
    """The first layers are not trained."""

    def __init__(self):
        super().__init__()
        self.model[:2].requires_grad_(False)

    def configure_optimizers(self):
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=0.05, momentum=0.9)


def test_frozen_layers_are_cut_and_stay_frozen(pruning, trainer):
    module, callback = Frozen(), pruning(compensation=None)
    first = module.model[0].weight.detach().clone()
    trainer(callback).fit(module, loader(), loader(32, 1))
    left = module.model[0].weight
    assert len(left) < 12
    assert not left.requires_grad
    gone = set(callback.pruner.record.removed["0.weight"][0])
    assert torch.equal(left, first[[i for i in range(12) if i not in gone]])


class Transfer(OneNetwork):
    """What BackboneFinetuning wants: a backbone that is frozen at first."""

    def __init__(self):
        super().__init__()
        self.backbone = nn.Sequential(nn.Conv2d(3, 12, 3), nn.ReLU(), nn.Conv2d(12, 16, 3), nn.ReLU())
        self.model = nn.Linear(16, CLASSES)

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self.model(self.backbone(batch[0]).amax((2, 3))), batch[1])

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self.training_step(batch, batch_idx))

    def configure_optimizers(self):
        return torch.optim.Adam([p for p in self.parameters() if p.requires_grad], lr=0.01)


def test_backbone_finetuning(pruning, trainer, tmp_path):
    """Cut while frozen, then unfrozen: the optimizer gets what is left, and a resumed run agrees.

    After the unfreezing Lightning does not resume exactly even without pruning: it keeps the groups' first learning rates.
    """
    module = Transfer()
    start = copy.deepcopy(module)

    def callbacks():
        return pruning(schedule=Schedule("linear", start=1, interval=3, steps=2)), BackboneFinetuning(3, verbose=False)

    saved = ModelCheckpoint(tmp_path / "all", "{epoch}", save_top_k=-1)
    fitted = trainer(*callbacks(), saved, max_epochs=8, enable_checkpointing=True)
    fitted.fit(module, loader(), loader(32, 1))
    held = {id(p) for group in fitted.optimizers[0].param_groups for p in group["params"]}
    assert held == {id(p) for p in module.parameters()}
    assert all(p.requires_grad for p in module.parameters())
    for epoch in (0, 1, 2):
        resumed = copy.deepcopy(start)
        path = tmp_path / "all" / f"epoch={epoch}.ckpt"
        trainer(*callbacks(), max_epochs=8).fit(resumed, loader(), loader(32, 1), ckpt_path=path)
        assert all(torch.equal(value, module.state_dict()[name]) for name, value in resumed.state_dict().items())


AVERAGES = {
    "ema": lambda: averaging(decay=0.9),
    "ema without buffers": lambda: averaging(decay=0.9, use_buffers=False),
    "mean": lambda: averaging("WeightAveraging"),
    "swa": lambda: StochasticWeightAveraging(0.005, swa_epoch_start=4),
}


@pytest.mark.filterwarnings("ignore:.*epoch parameter in `scheduler.step")
@pytest.mark.filterwarnings("ignore:SWA is initializing")
@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("name", AVERAGES)
def test_averages_follow_the_cut(name, first, pruning, trainer):
    """Whichever callback comes first; the averaged network ends as small as the trained one, and as the final weights."""
    module, callback, average = OneNetwork(), pruning(), AVERAGES[name]()
    whole = n_params(module)
    shapes = {}

    class Watch(Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            held = getattr(average._average_model, "module", average._average_model)
            shapes[trainer.current_epoch] = [p.shape for p in held.parameters()] == [p.shape for p in pl_module.parameters()]

    order = (callback, average) if first else (average, callback)
    trainer(*order, Watch(), max_epochs=8).fit(module, loader(), loader(32, 1))
    assert pruned_and_trained(module, whole)
    assert all(shapes.values())
    held = getattr(average._average_model, "module", average._average_model)
    assert all(torch.equal(ours, mean) for ours, mean in zip(module.parameters(), held.parameters(), strict=True))


@pytest.mark.filterwarnings("ignore:You're using the WeightAveraging callback")
@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("guarded", [True, False])
def test_a_run_with_an_average_resumes_exactly(first, guarded, pruning, trainer, tmp_path):
    start = OneNetwork()

    def callbacks():
        options = {"monitor": "val_loss", "max_metric_drop": 0.01} if guarded else {}
        schedule = Schedule("linear", start=1, interval=2, steps=3)
        pair = [pruning(schedule=schedule, **options), averaging(decay=0.8)]
        return pair if first else pair[::-1]

    module, saved = copy.deepcopy(start), ModelCheckpoint(tmp_path / "all", "{epoch}", save_top_k=-1)
    trainer(*callbacks(), saved, max_epochs=9, enable_checkpointing=True).fit(module, loader(), loader(32, 1))
    for epoch in range(8):
        resumed = copy.deepcopy(start)
        path = tmp_path / "all" / f"epoch={epoch}.ckpt"
        trainer(*callbacks(), max_epochs=9).fit(resumed, loader(), loader(32, 1), ckpt_path=path)
        assert all(torch.equal(value, module.state_dict()[name]) for name, value in resumed.state_dict().items()), epoch


def test_early_stopping_plateau_monitor_and_best_checkpoint(pruning, trainer, tmp_path):
    class Plateau(OwnForward):
        def configure_optimizers(self):
            optimizer = torch.optim.Adam(self.parameters(), lr=0.01)
            scheduler = {"scheduler": ReduceLROnPlateau(optimizer, patience=1), "monitor": "val_loss"}
            return {"optimizer": optimizer, "lr_scheduler": scheduler}

    module, callback = Plateau(), pruning()
    whole = n_params(module)
    best = ModelCheckpoint(tmp_path, "{epoch}", monitor="val_loss", save_top_k=2, save_last=True)
    stop = EarlyStopping("val_loss", patience=6)
    fitted = trainer(callback, best, stop, max_epochs=8, enable_checkpointing=True)
    fitted.fit(module, loader(), loader(32, 1))
    assert pruned_and_trained(module, whole)
    (result,) = fitted.test(module, loader(32, 1), ckpt_path="best", verbose=False)
    assert result["test_loss"] == pytest.approx(float(best.best_model_score), abs=1e-6)


def test_learning_rates_and_scheduled_accumulation(pruning, trainer, list_logger):
    module, callback = OneNetwork(), pruning()
    whole = n_params(module)
    extra = (LearningRateMonitor(), GradientAccumulationScheduler({0: 1, 3: 4}))
    trainer(callback, *extra, logger=[list_logger], log_every_n_steps=1).fit(module, loader(), loader(32, 1))
    assert pruned_and_trained(module, whole)


class Manual(OwnForward):
    """Accumulates gradients over two batches by hand."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        self.manual_backward(super().training_step(batch, batch_idx))
        if batch_idx % 2:
            optimizer.step()
            optimizer.zero_grad()

    def on_train_epoch_end(self):
        self.lr_schedulers().step()


def test_manual_accumulation(pruning, trainer):
    module, callback = Manual(), pruning()
    whole = n_params(module)
    trainer(callback).fit(module, loader(), loader(32, 1))
    assert pruned_and_trained(module, whole)


class ByExample(OwnForward):
    """Validation cannot run outside its loop; the example is on the module."""

    def __init__(self):
        super().__init__()
        self.example_input_array = torch.zeros(2, 3, 8, 8)

    def validation_step(self, batch, batch_idx):
        if self.trainer.sanity_checking or not self.trainer.evaluating or self._current_fx_name != "validation_step":
            raise RuntimeError("only in the loop")
        super().validation_step(batch, batch_idx)


def test_example_input_array_where_validation_cannot_be_run_early(pruning, trainer):
    module, callback = ByExample(), pruning()
    whole = n_params(module)
    trainer(callback, num_sanity_val_steps=0).fit(module, loader(), loader(32, 1))
    assert pruned_and_trained(module, whole)
