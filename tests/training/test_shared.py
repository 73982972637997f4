"""Modules that a LightningModule knows by several names, or that two of its parts hold."""

import copy

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from actprune.schedule import Schedule
from averaging import averaging
from foreign import Adam, loader, network

pytestmark = pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")


def n_params(module):
    return sum(p.numel() for p in module.parameters())


def averaged(module):
    return AveragedModel(module, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True).requires_grad_(False)


class InTwo(Adam):
    """Backbone, head, and the two of them as one model, which is what runs."""

    def __init__(self):
        super().__init__()
        whole = network()
        self.backbone, self.head = whole[:6], whole[6:]
        self.model = nn.Sequential(self.backbone, self.head)
        self.averages = nn.ModuleDict()

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self.model(batch[0]), batch[1])

    def on_train_batch_end(self, *args):
        for name, average in self.averages.items():
            average.update_parameters(getattr(self, name))

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self.training_step(batch, batch_idx))


class OfParts(InTwo):
    """Averages of what the network holds, by names that are not those in the network."""

    def __init__(self):
        super().__init__()
        self.averages = nn.ModuleDict({name: averaged(getattr(self, name)) for name in ("backbone", "head")})


class PartsValidated(OfParts):
    """Runs the average of a part in validation too."""

    def validation_step(self, batch, batch_idx):
        super().validation_step(batch, batch_idx)
        self.averages["head"](self.backbone(batch[0]))


class OfModel(InTwo):
    """An average of what holds the network."""

    def __init__(self):
        super().__init__()
        self.averages = nn.ModuleDict({"model": averaged(self.model)})


class Wrapped(InTwo):
    """Another module holds the network whole."""

    def __init__(self):
        super().__init__()
        self.predictor = nn.Sequential(self.model, nn.Softmax(1))

    def validation_step(self, batch, batch_idx):
        super().validation_step(batch, batch_idx)
        self.predictor[1](self.predictor[0](batch[0]))


class Penalised(InTwo):
    """Modules without parameters of their own run layers of the network, or read them."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(self.backbone[0], nn.ReLU())
        self.again = nn.Sequential(self.head)

    def training_step(self, batch, batch_idx):
        return super().training_step(batch, batch_idx) + 0.01 * self.stem(batch[0]).square().mean()

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", super().training_step(batch, batch_idx))


class Inside(nn.Module):
    """A network with an average in it."""

    def __init__(self):
        super().__init__()
        self.body = network()
        self.average = averaged(self.body)

    def forward(self, x):
        return self.body(x)


class ByFirstName(InTwo):
    """What the network averages has a shorter name outside."""

    def __init__(self):
        super().__init__()
        model = Inside()
        del self.backbone, self.head, self.model
        self.body, self.model = model.body, model

    def on_train_batch_end(self, *args):
        self.model.average.update_parameters(self.body)


FOLLOWING = {"in two": InTwo, "of parts": OfParts, "wrapped": Wrapped, "penalised": Penalised, "by first name": ByFirstName}


@pytest.mark.parametrize("kind", FOLLOWING)
def test_further_names_for_a_network_and_its_parts_are_no_others(kind, pruning, trainer, tmp_path):
    def callback():
        return pruning(schedule=Schedule("linear", start=1, interval=1, steps=2))

    module, first = FOLLOWING[kind](), callback()
    start, saved = copy.deepcopy(module), ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1)
    trainer(first, saved, enable_checkpointing=True).fit(module, loader(), loader(32, 1))
    network = module.body if kind == "by first name" else module.model
    assert list(first.pruners) == ["model"]
    assert first.stopped["reason"] == "budget"
    assert n_params(network) == first.pruner.params <= 0.4 * first.pruner.params_before
    for epoch in (0, 1, 2, 4):
        resumed, again = copy.deepcopy(start), callback()
        trainer(again).fit(resumed, loader(), loader(32, 1), ckpt_path=tmp_path / f"epoch={epoch}.ckpt")
        assert all(torch.equal(value, module.state_dict()[name]) for name, value in resumed.state_dict().items())
        assert again.history == first.history


@pytest.mark.parametrize("kind", [InTwo, OfParts])
def test_averages_that_callbacks_hold_follow(kind, pruning, trainer):
    module, callback = kind(), pruning()
    trainer(callback, averaging(decay=0.9)).fit(module, loader(), loader(32, 1))
    assert callback.stopped["reason"] == "budget"
    for name, average in module.averages.items():
        assert [p.shape for p in average.parameters()] == [p.shape for p in getattr(module, name).parameters()]


def test_an_average_of_what_holds_the_network_follows(pruning, trainer):
    module, callback = OfModel(), pruning(modules=["backbone"])
    trainer(callback).fit(module, loader(), loader(32, 1))
    assert callback.stopped["reason"] == "budget"
    assert module.backbone[0].out_channels < 12
    shapes = [p.shape for p in module.model.parameters()]
    assert shapes == [p.shape for p in module.averages["model"].parameters()]


class SharedLayer(InTwo):
    """A layer of the network is the first of another one."""

    def __init__(self):
        super().__init__()
        self.other = nn.Sequential(self.backbone[0], nn.Conv2d(12, 4, 1))


class SharedWithCopy(InTwo):
    """An average holds a layer of the network itself."""

    def __init__(self):
        super().__init__()
        self.averages = nn.ModuleDict({"model": averaged(self.model)})
        self.averages["model"].module[1][2] = self.head[2]


REFUSED = {
    "a layer": (SharedLayer, {}, r"model.0.0.weight is also other.0.weight, outside model, which would not follow a cut"),
    "a copy": (SharedWithCopy, {}, r"model.1.8.weight is also averages.model.module.1.8.weight, outside model"),
    "twice": (InTwo, {"modules": ["model", "backbone"]}, "names 'backbone' and 'model', which holds it; name one of the two"),
    "copy of a part": (
        PartsValidated,
        {"modules": ["model", "averages.head"]},
        "head and averages.head.module are copies of one another",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_another_module_holds_too_is_refused_before_training(case, refused):
    kind, options, match = REFUSED[case]
    refused(kind(), match, **options)
