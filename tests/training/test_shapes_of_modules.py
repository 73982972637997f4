"""LightningModules of unusual shape: built late, steps with few or many arguments, networks inside metrics."""

import pytest
import torch
from lightning import Callback
from torch import nn
from torch.nn import functional as F
from torchmetrics import Metric
from torchmetrics.classification import MulticlassAUROC

from actprune.core.errors import ConfigError
from actprune.criteria import Entropy, Taylor
from foreign import CLASSES, Adam, loader, network


class Late(Adam):
    """Knows its network only once it is set up."""

    def __init__(self, where):
        super().__init__()
        self.where, self.net = where, None

    def setup(self, stage):
        self.build("setup")

    def configure_model(self):
        self.build("configure_model")

    def build(self, where):
        if where == self.where and self.net is None:
            self.net = network()

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", F.cross_entropy(self.net(batch[0]), batch[1]))


@pytest.mark.parametrize("where", ["setup", "configure_model"])
def test_a_network_that_is_built_late_may_be_named(where, pruning, trainer):
    module, callback = Late(where), pruning(modules=["net"])
    trainer(callback, max_epochs=4).fit(module, loader(), loader(32, 1))
    assert list(callback.pruners) == ["net"]
    assert module.net[0].out_channels < 12


@pytest.mark.parametrize("sanity", [1, 0])
@pytest.mark.filterwarnings("ignore:Lazy modules|The total number of parameters")
def test_lazy_layers_get_their_shapes_first(sanity, pruning, trainer):
    module, callback = Late("setup"), pruning()
    module.net = network()
    module.net[0] = nn.LazyConv2d(12, 3, padding=1)
    trainer(callback, max_epochs=4, num_sanity_val_steps=sanity).fit(module, loader(), loader(32, 1))
    assert callback.stopped["reason"] == "budget"
    assert type(module.net[0]) is nn.Conv2d


class Parts(Adam):
    def __init__(self):
        super().__init__()
        self.encoder = nn.Sequential(nn.Conv2d(3, 12, 3), nn.ReLU())
        self.head = nn.Linear(12, CLASSES)

    def loss(self, batch):
        return F.cross_entropy(self.head(self.encoder(batch[0]).amax((2, 3))), batch[1])

    def training_step(self, batch):
        return self.loss(batch)


class BatchAlone(Parts):
    def validation_step(self, batch):
        self.log("val_loss", self.loss(batch))


class LoaderNumber(Parts):
    def validation_step(self, batch, batch_idx, dataloader_idx):
        self.log(f"val_loss_{dataloader_idx:d}", self.loss(batch))


class DrawsItself(Parts):
    def validation_step(self, dataloader_iter):
        batch, _, _ = next(dataloader_iter)
        self.log("val_loss", self.loss(batch), batch_size=16)


@pytest.mark.parametrize("sanity", [1, 0])
@pytest.mark.parametrize(("kind", "loaders"), [(BatchAlone, 1), (LoaderNumber, 2)])
def test_steps_take_what_they_take(kind, loaders, sanity, pruning, trainer):
    module, callback = kind(), pruning()
    validation = [loader(32, 1), loader(16, 2)][:loaders]
    trainer(callback, max_epochs=4, num_sanity_val_steps=sanity).fit(module, loader(), validation)
    assert list(callback.pruners) == [""]
    assert module.encoder[0].out_channels < 12


@pytest.mark.filterwarnings("ignore:You are using the `dataloader_iter` step flavor")
@pytest.mark.filterwarnings("ignore:Found `dataloader_iter` argument")
def test_a_step_that_draws_its_batches_needs_names(pruning, trainer):
    with pytest.raises(ConfigError, match=r"DrawsItself takes dataloader_iter .* modules=\[...\]"):
        trainer(pruning()).fit(DrawsItself(), loader(), loader(32, 1))
    module = DrawsItself()
    module.encoder = nn.Sequential(nn.Conv2d(3, 10, 3), nn.ReLU(), nn.Conv2d(10, 12, 3))
    trainer(pruning(modules=["encoder"]), max_epochs=4).fit(module, loader(), loader(32, 1))
    assert module.encoder[0].out_channels < 10


class Perceptual(Metric):
    """Judges by a network of its own, as FID and LPIPS do."""

    def __init__(self):
        super().__init__()
        self.features = nn.Sequential(nn.Flatten(), nn.Linear(192, 64), nn.ReLU(), nn.Linear(64, 2))
        self.add_state("total", torch.zeros(()), "sum")

    def update(self, images):
        self.total += self.features(images).square().mean()

    def compute(self):
        return self.total


class Judged(Parts):
    def __init__(self):
        super().__init__()
        self.perceptual = Perceptual()

    def validation_step(self, batch, batch_idx):
        self.perceptual.update(batch[0])
        self.log("val_loss", self.loss(batch))
        self.log("perceptual", self.perceptual)

    def configure_optimizers(self):
        return torch.optim.Adam([*self.encoder.parameters(), *self.head.parameters()], 0.01)


@pytest.mark.parametrize("sanity", [1, 0])
def test_a_network_inside_a_metric_is_neither_cut_nor_counted(sanity, pruning, trainer):
    module, callback = Judged(), pruning()
    trainer(callback, max_epochs=4, num_sanity_val_steps=sanity).fit(module, loader(), loader(32, 1))
    assert module.perceptual.features[1].out_features == 64
    left = sum(p.numel() for part in (module.encoder, module.head) for p in part.parameters())
    assert callback.pruner.params == left <= 0.4 * callback.pruner.params_before
    width = module.encoder[0].out_channels
    assert callback.pruner.macs == 36 * 27 * width + CLASSES * width


class Listing(Parts):
    """A metric that keeps all it sees in lists: its hash is that of its content."""

    def __init__(self):
        super().__init__()
        self.auroc = MulticlassAUROC(CLASSES)

    def validation_step(self, batch, batch_idx):
        logits = self.head(self.encoder(batch[0]).amax((2, 3)))
        self.auroc.update(logits.softmax(1), batch[1])
        self.log("val_loss", F.cross_entropy(logits, batch[1]))
        self.log("auroc", self.auroc)


class Counted(Callback):
    def __init__(self):
        self.samples = []

    def on_validation_epoch_end(self, trainer, module):
        self.samples.append(sum(map(len, module.auroc.preds)))


@pytest.mark.parametrize("sanity", [1, 0])
@pytest.mark.parametrize("criterion", [Entropy(bins=16), Taylor()])
@pytest.mark.filterwarnings("ignore:Metric `AUROC` will save all targets")
def test_metrics_that_keep_lists_hold_what_validation_gave_them(criterion, sanity, pruning, trainer):
    module, callback, counted = Listing(), pruning(criterion=criterion), Counted()
    trainer(counted, callback, max_epochs=4, num_sanity_val_steps=sanity).fit(module, loader(), loader(32, 1))
    assert module.encoder[0].out_channels < 12
    assert counted.samples == [16] * sanity + [32] * 4
