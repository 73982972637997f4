"""An average in the pruned module: what is trained is pruned, counted and reported, and the average follows once."""

import copy

import pytest
import torch
from lightning import Callback, LightningModule
from lightning.pytorch.callbacks import ModelCheckpoint, StochasticWeightAveraging
from torch import nn
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from actprune.core.budget import Budget
from actprune.schedule import Schedule
from averaging import averaging
from foreign import loader, network

pytestmark = pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")


def n_params(*modules):
    return sum(p.numel() for module in modules for p in module.parameters())


class Averaged(LightningModule):
    """Keeps torch's average of its network."""

    copies = None
    trained = ("net",)

    def __init__(self):
        super().__init__()
        self.net = network()
        self.ema = AveragedModel(self.net, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True).requires_grad_(False)

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self(batch[0]), batch[1])

    def on_train_batch_end(self, *args):
        self.ema.update_parameters(self.net)

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", F.cross_entropy(self(batch[0]), batch[1]))

    def configure_optimizers(self):
        return torch.optim.Adam([p for p in self.parameters() if p.requires_grad], lr=0.01)

    def average(self):
        return self.ema.module


class Compared(Averaged):
    """Validates the network and its average, one after the other."""

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", F.cross_entropy(self.net(batch[0]), batch[1]))
        self.log("ema_loss", F.cross_entropy(self.ema(batch[0]), batch[1]))


class Ensemble(Averaged):
    """Adds up what both say, inside one forward."""

    def forward(self, x):
        return self.net(x) + self.ema(x)


class Momentum(Averaged):
    """A copy that the module's own code keeps."""

    copies = {"ema": "net"}  # noqa: RUF012

    def __init__(self):
        super().__init__()
        self.ema = copy.deepcopy(self.net).requires_grad_(False)

    @torch.no_grad()
    def on_train_batch_end(self, *args):
        for slow, fast in zip(self.ema.parameters(), self.net.parameters(), strict=True):
            slow.lerp_(fast, 0.1)

    def average(self):
        return self.ema


class Bootstrap(Momentum):
    """The loss of BYOL, in validation as in training: the target runs first."""

    trained = ("net", "predictor")

    def __init__(self):
        super().__init__()
        self.predictor = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 4))

    def training_step(self, batch, batch_idx):
        target = self.ema(batch[0])
        return F.mse_loss(self.predictor(self.net(batch[0])), target)

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self.training_step(batch, batch_idx))


class Served(Averaged):
    """Validates the average alone."""

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", F.cross_entropy(self.ema(batch[0]), batch[1]))


class ServedInside(Averaged):
    """Runs the average in evaluation mode, in its own forward."""

    def forward(self, x):
        return self.net(x) if self.training else self.ema(x)


class ServedBelow(Averaged):
    """A head is trained on the network and validated on its average."""

    trained = ("net", "head")

    def __init__(self):
        super().__init__()
        self.head = nn.Sequential(nn.ReLU(), nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 4))

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self.head(self.net(batch[0])), batch[1])

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", F.cross_entropy(self.head(self.ema(batch[0])), batch[1]))


class SlowToo(Averaged):
    """Two averages of one network."""

    def __init__(self):
        super().__init__()
        self.slow = AveragedModel(self.net, multi_avg_fn=get_ema_multi_avg_fn(0.99), use_buffers=True)

    def on_train_batch_end(self, *args):
        super().on_train_batch_end()
        self.slow.update_parameters(self.net)


class SlowServed(SlowToo):
    """Validates one of two averages."""

    validation_step = Served.validation_step


KINDS = [Averaged, Compared, Ensemble, Momentum, Bootstrap, Served, ServedInside, ServedBelow, SlowToo, SlowServed]


class Given(Averaged):
    """An average of a network that is no part of the module."""

    def __init__(self):
        super().__init__()
        self.reference = AveragedModel(nn.Sequential(nn.Linear(3, 6), nn.ReLU(), nn.Linear(6, 2)))


class OfItself(Averaged):
    """Averages the whole LightningModule, inside of it."""

    def __init__(self):
        super().__init__()
        del self.ema
        self.ema = AveragedModel(self)


class Twins(Averaged):
    """Two networks may be what is averaged."""

    def __init__(self):
        super().__init__()
        self.other = network()


class Counts(Callback):
    """Counts the parameters that are trained, by itself, whenever they are reported."""

    def __init__(self):
        self.counted = []

    def on_validation_end(self, trainer, module):
        if not trainer.sanity_checking:
            assert [p.shape for p in module.average().parameters()] == [p.shape for p in module.net.parameters()]
            self.counted.append(n_params(*(getattr(module, name) for name in module.trained)))


def settings(kind, **others):
    return {"copies": kind.copies, "schedule": Schedule("linear", start=1, interval=1, steps=2), **others}


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_trained_is_counted_and_the_average_follows(kind, pruning, trainer):
    module, counts = kind(), Counts()
    whole = n_params(*(getattr(module, name) for name in kind.trained))
    callback = pruning(**settings(kind, budget=Budget(params=0.6)))
    trainer(callback, counts).fit(module, loader(), loader(32, 1))
    assert callback.stopped["reason"] == "budget"
    assert callback.pruner.params_before == whole
    assert [row["params"] for row in callback.history] == counts.counted
    assert [event["params"][1] for event in callback.events] == sorted(set(counts.counted) - {whole}, reverse=True)
    assert 0.35 * whole < counts.counted[-1] <= 0.6 * whole
    others = [module.average(), *([module.slow.module] if issubclass(kind, SlowToo) else [])]
    for average in others:
        assert [b.shape for b in average.buffers()] == [b.shape for b in module.net.buffers()]
        assert [layer.out_channels for layer in average if isinstance(layer, nn.Conv2d)] == [
            layer.out_channels for layer in module.net if isinstance(layer, nn.Conv2d)
        ]
        assert all(not torch.equal(a, b) for a, b in zip(average.parameters(), module.net.parameters(), strict=True))


@pytest.mark.parametrize("kind", [Averaged, Compared, Momentum])
@pytest.mark.parametrize("unit", ["params", "macs", "units"])
def test_it_does_what_naming_the_network_does(kind, unit, pruning, trainer):
    runs = []
    for modules in (None, ["net"]):
        torch.manual_seed(0)
        module = kind()
        callback = pruning(**settings(kind, modules=modules, budget=Budget(**{unit: 0.6})))
        trainer(callback).fit(module, loader(), loader(32, 1))
        runs.append((module.state_dict(), [{**row} for row in callback.history]))
    (one, rows), (other, expected) = runs
    assert rows == expected
    assert all(torch.equal(value, other[name]) for name, value in one.items())


@pytest.mark.parametrize("kind", [Averaged, Bootstrap, ServedInside])
def test_resumed_runs_give_the_same_network(kind, pruning, trainer, tmp_path):
    module = kind()
    start, saved = copy.deepcopy(module), ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1)
    trainer(callback := pruning(**settings(kind)), saved, enable_checkpointing=True).fit(module, loader(), loader(32, 1))
    for epoch in range(5):
        resumed, again = copy.deepcopy(start), pruning(**settings(kind))
        trainer(again).fit(resumed, loader(), loader(32, 1), ckpt_path=tmp_path / f"epoch={epoch}.ckpt")
        assert all(torch.equal(value, module.state_dict()[name]) for name, value in resumed.state_dict().items())
        assert again.history == callback.history


def test_checkpoints_whose_record_is_silent_of_the_average_load(pruning, trainer, tmp_path):
    module, path = Averaged(), tmp_path / "epoch=3.ckpt"
    start, saved = copy.deepcopy(module), ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1)
    trainer(pruning(**settings(Averaged)), saved, enable_checkpointing=True).fit(module, loader(), loader(32, 1))
    checkpoint = torch.load(path, weights_only=True)
    record = checkpoint["actprune"][""]
    for entry in ("removed", "shapes", "attributes"):
        record[entry] = {name: value for name, value in record[entry].items() if not name.startswith("ema")}
    record["biases"] = [name for name in record["biases"] if not name.startswith("ema")]
    torch.save(checkpoint, path)
    trainer(pruning(**settings(Averaged))).fit(start, loader(), loader(32, 1), ckpt_path=path)
    assert all(torch.equal(value, module.state_dict()[name]) for name, value in start.state_dict().items())


def test_a_step_is_taken_back_from_the_average_too(pruning, trainer):
    class Large(Compared):
        def validation_step(self, batch, batch_idx):
            super().validation_step(batch, batch_idx)
            self.log("size", float(n_params(self.net)))

    module = Large()
    whole = [value.shape for value in module.state_dict().values()]
    callback = pruning(monitor="size", mode="max", max_metric_drop=0.0)
    trainer(callback, max_epochs=8).fit(module, loader(), loader(32, 1))
    assert any(event.get("went_back") for event in callback.events)
    assert callback.stopped["reason"] == "metric"
    assert [value.shape for value in module.state_dict().values()] == whole
    assert callback.pruner.params == n_params(module.net)


OUTER = {"ema": lambda: averaging(decay=0.9), "swa": lambda: StochasticWeightAveraging(0.01, swa_epoch_start=0.5)}


@pytest.mark.parametrize("kind", [Averaged, Compared, Ensemble, Momentum, Served, SlowToo])
@pytest.mark.parametrize("outer", OUTER)
def test_averages_of_the_whole_module_follow_beside_those_inside(kind, outer, pruning, trainer):
    module = kind()
    trainer(callback := pruning(copies=kind.copies), OUTER[outer]()).fit(module, loader(), loader(32, 1))
    assert callback.stopped["reason"] == "budget"
    shapes = [p.shape for p in module.net.parameters()]
    assert shapes == [p.shape for p in module.average().parameters()]
    assert n_params(module.net) == callback.history[-1]["params"]


def test_they_do_so_in_resumed_runs_and_where_a_step_is_taken_back(pruning, trainer, tmp_path):
    class Large(Compared):
        def validation_step(self, batch, batch_idx):
            super().validation_step(batch, batch_idx)
            self.log("size", float(n_params(self.net)))

    def callback():
        return pruning(**settings(Large, modules=["net"], monitor="size", mode="max", max_metric_drop=1000.0))

    module, first = Large(), callback()
    start, saved = copy.deepcopy(module), ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1)
    options = {"max_epochs": 8, "enable_checkpointing": True}
    trainer(first, OUTER["ema"](), saved, **options).fit(module, loader(), loader(32, 1))
    assert any(event.get("went_back") for event in first.events)
    assert n_params(module.net) < first.pruner.params_before
    for epoch in (1, 3, 5):
        resumed, again, path = copy.deepcopy(start), callback(), tmp_path / f"epoch={epoch}.ckpt"
        trainer(again, OUTER["ema"](), max_epochs=8).fit(resumed, loader(), loader(32, 1), ckpt_path=path)
        assert all(torch.equal(value, module.state_dict()[name]) for name, value in resumed.state_dict().items())
        assert again.history == first.history


@pytest.mark.parametrize("modules", [None, ["net"]])
def test_an_average_of_nothing_in_the_module_is_no_copy(modules, pruning, trainer):
    module = Given()
    trainer(callback := pruning(modules=modules)).fit(module, loader(), loader(32, 1))
    assert callback.stopped["reason"] == "budget"
    assert [p.shape for p in module.average().parameters()] == [p.shape for p in module.net.parameters()]
    assert module.reference.module[0].out_features == 6


class TwoServed(SlowToo):
    """Validates both of two averages."""

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", F.cross_entropy(self.ema(batch[0]) + self.slow(batch[0]), batch[1]))


REFUSED = {
    "both": (Compared, {"modules": ["net", "ema"]}, r"'net' and 'ema', but net and ema.module are copies of one another"),
    "two averages": (TwoServed, {"modules": ["ema", "slow"]}, r"ema.module and slow.module are copies of one another"),
    "of itself": (OfItself, {}, "ema averages all of OfItself, which holds it"),
    "which of two": (Twins, {}, r"2 modules of Twins may be .* \(net, other\); say which, e.g. copies=\{'ema': 'net'\}"),
    "each other": (Momentum, {"copies": {"net": "ema", "ema": "net"}}, "copy of itself"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_before_training(case, refused):
    kind, options, match = REFUSED[case]
    refused(kind(), match, **options)
