"""Several networks in one LightningModule: some are pruned, some share, some are copies of others."""

import copy
from dataclasses import dataclass

import pytest
import torch
from lightning import LightningModule
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader

from actprune.core.budget import Budget
from actprune.core.errors import BudgetError, ConfigError
from actprune.core.record import record_of
from actprune.pruning import Selection
from actprune.schedule import Schedule
from foreign import CLASSES, Adam, OneNetwork, OwnForward, dataset, loader, network

pytestmark = pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")


def n_params(module):
    return sum(p.numel() for p in module.parameters())


def perceptron(inside, hidden, outside):
    return nn.Sequential(nn.Linear(inside, hidden), nn.ReLU(), nn.Linear(hidden, outside))


class Autoencoder(Adam):
    """forward is the encoder alone; the steps call encoder and decoder."""

    def __init__(self):
        super().__init__()
        self.encoder, self.decoder = perceptron(192, 24, 6), perceptron(6, 20, 192)

    def forward(self, x):
        return self.encoder(x)

    def training_step(self, batch, batch_idx):
        x = batch[0].flatten(1)
        loss = F.mse_loss(self.decoder(self.encoder(x)), x)
        self.log("loss", loss)
        return loss

    def validation_step(self, batch, batch_idx):
        x = batch[0].flatten(1)
        self.log("val_loss", F.mse_loss(self.decoder(self.encoder(x)), x))


class Adversarial(LightningModule):
    """Two networks, two optimizers, manual optimization; validation looks at both."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False
        self.generator, self.critic = perceptron(4, 16, 192), perceptron(192, 20, 1)

    def configure_optimizers(self):
        return [torch.optim.Adam(self.generator.parameters(), 1e-3), torch.optim.RMSprop(self.critic.parameters(), 1e-3)], []

    def training_step(self, batch, batch_idx):
        real = batch[0].flatten(1)
        first, second = self.optimizers()
        fake = self.generator(torch.randn(len(real), 4))
        self.toggle_optimizer(second)
        loss = F.softplus(-self.critic(real)).mean() + F.softplus(self.critic(fake.detach())).mean()
        second.zero_grad()
        self.manual_backward(loss)
        self.clip_gradients(second, 1.0, "norm")
        second.step()
        self.untoggle_optimizer(second)
        self.toggle_optimizer(first)
        loss = F.softplus(-self.critic(fake)).mean()
        first.zero_grad()
        self.manual_backward(loss)
        first.step()
        self.untoggle_optimizer(first)

    def validation_step(self, batch, batch_idx):
        fake = self.generator(torch.ones(len(batch[0]), 4))
        self.log("val_loss", F.softplus(-self.critic(fake)).mean())


def fit(module, callback, trainer, train=None, val=None, **options):
    fitted = trainer(callback, **options)
    fitted.fit(module, train or loader(), val or loader(32, 1))
    return fitted


def widths(callback):
    return {path: {name: now for name, _, now in pruner.widths()} for path, pruner in callback.pruners.items()}


@pytest.mark.parametrize("sanity", [2, 0])
def test_only_the_named_network_is_pruned(sanity, pruning, trainer):
    module, callback = Autoencoder(), pruning(modules=["encoder"])
    decoder, encoder = n_params(module.decoder), n_params(module.encoder)
    fit(module, callback, trainer, num_sanity_val_steps=sanity)
    assert list(callback.pruners) == ["encoder"]
    assert callback.pruner.model is module.encoder
    assert n_params(module.encoder) <= 0.4 * encoder
    assert n_params(module.decoder) == decoder
    assert module.encoder[2].out_features == 6


def test_several_named_networks_are_pruned_each_to_the_budget(pruning, trainer, tmp_path):
    module = Autoencoder()
    start = copy.deepcopy(module)
    callback = pruning(modules=["encoder", "decoder"], schedule=Schedule("linear", start=1, interval=2, steps=2))
    before = {path: n_params(module.get_submodule(path)) for path in ("encoder", "decoder")}
    saved = ModelCheckpoint(tmp_path / "all", "{epoch}", save_top_k=-1)
    fitted = trainer(callback, saved, enable_checkpointing=True)
    fitted.fit(module, loader(), loader(32, 1))
    for path, whole in before.items():
        assert n_params(module.get_submodule(path)) <= 0.4 * whole
    assert callback.history[-1]["params"] == n_params(module)
    assert set(callback.events[0]["widths"]) == {"encoder.0", "decoder.0"}
    for epoch in range(5):
        resumed, again = copy.deepcopy(start), pruning(modules=["encoder", "decoder"], schedule=callback.schedule)
        trainer(again).fit(resumed, loader(), loader(32, 1), ckpt_path=tmp_path / "all" / f"epoch={epoch}.ckpt")
        assert all(torch.equal(value, module.state_dict()[name]) for name, value in resumed.state_dict().items())
        assert again.history == callback.history
    fitted.validate(module, loader(32, 1), ckpt_path=tmp_path / "all" / "epoch=2.ckpt", verbose=False)
    assert before["encoder"] > n_params(module.encoder) > 0.4 * before["encoder"]


def test_names_to_ignore_are_those_of_any_of_the_networks(pruning, trainer):
    module = Autoencoder()
    callback = pruning(modules=["encoder", "decoder"], selection=Selection(ignore=["2", "nowhere"]))
    with pytest.raises(ConfigError, match="ignore='nowhere' matches no module"):
        fit(module, callback, trainer)


def test_forward_that_is_only_a_part_is_seen_through(pruning, trainer):
    """validation_step does not call forward, so the whole of what it runs is pruned."""
    module, callback = Autoencoder(), pruning()
    before = n_params(module)
    fit(module, callback, trainer)
    assert widths(callback)[""].keys() == {"encoder.0", "encoder.2", "decoder.0"}
    assert n_params(module) <= 0.4 * before


def test_manual_optimization_of_two_networks_with_two_optimizers(pruning, trainer):
    module, callback = Adversarial(), pruning(modules=["generator", "critic"])
    before = n_params(module.generator), n_params(module.critic)
    fitted = fit(module, callback, trainer)
    for net, optimizer, whole in zip((module.generator, module.critic), fitted.optimizers, before, strict=True):
        assert n_params(net) <= 0.4 * whole
        assert {id(p) for p in net.parameters()} == {id(p) for g in optimizer.param_groups for p in g["params"]}
        assert all(optimizer.state[p]["step"] == 36 for p in net.parameters())


class Methods(Adam):
    """Calls methods of its network, never the network."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.outer = perceptron(192, 24, 8), perceptron(8, 16, CLASSES)

        def encode(self, x):
            return self.inner(x.flatten(1))

        def classify(self, h):
            return self.outer(torch.relu(h))

    def __init__(self):
        super().__init__()
        self.net, self.extra = self.Net(), nn.Sequential(nn.Linear(8, 3), nn.BatchNorm1d(3))

    def training_step(self, batch, batch_idx):
        h = self.net.encode(batch[0])
        return F.cross_entropy(self.net.classify(h), batch[1]) + self.extra(h).square().mean()

    def validation_step(self, batch, batch_idx):
        h = self.net.encode(batch[0])
        self.log("val_loss", F.cross_entropy(self.net.classify(h), batch[1]) + self.extra(h).square().mean())


def test_methods_of_a_named_network(pruning, trainer):
    """What a module outside the network reads keeps its width; its batch norm is not run on one sample in training mode."""
    module, callback = Methods(), pruning(modules=["net"])
    fit(module, callback, trainer)
    assert module.net.inner[2].out_features == module.extra[0].in_features == 8
    assert n_params(module.net) <= 0.4 * callback.pruner.params_before
    assert n_params(module.extra) == 33


class Second(OwnForward):
    """The second validation loader alone runs the auxiliary network."""

    def __init__(self):
        super().__init__()
        self.auxiliary = perceptron(192, 32, 1)

    def training_step(self, batch, batch_idx):
        return super().training_step(batch, batch_idx) + self.auxiliary(batch[0].flatten(1)).square().mean()

    def validation_step(self, batch, batch_idx, dataloader_idx):
        if dataloader_idx == 0:
            self.log("val_loss", F.cross_entropy(self(batch[0]), batch[1]))
        else:
            self.log("val_aux", self.auxiliary(batch[0].flatten(1)).mean())


@pytest.mark.parametrize("sanity", [1, 0])
def test_a_network_that_only_a_later_loader_runs(sanity, pruning, trainer):
    module, callback = Second(), pruning(modules=["auxiliary"])
    fit(module, callback, trainer, val=[loader(32, 1), loader(16, 2)], num_sanity_val_steps=sanity)
    assert module.auxiliary[0].out_features < 32
    assert module.conv1.out_channels == 12


def test_several_loaders(pruning, trainer):
    module, callback = Second(), pruning(budget=Budget(params=0.8))  # the auxiliary network counts, and is not in forward
    fit(module, callback, trainer, val=[loader(32, 1), loader(24, 2, batch_size=8)])
    assert module.conv1.out_channels < 12


# batches of every kind


@dataclass
class Batch:
    image: torch.Tensor
    label: torch.Tensor
    note: str = ""


class Structured(Adam):
    """forward takes the batch itself."""

    def __init__(self):
        super().__init__()
        self.net = network()

    def forward(self, batch):
        return self.net(batch.image)

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self(batch), batch.label)

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", F.cross_entropy(self(batch), batch.label), batch_size=len(batch.label))


@pytest.mark.parametrize("sanity", [2, 0])
def test_dataclass_batches(sanity, pruning, trainer):
    def collate(rows):
        images, labels = zip(*rows, strict=True)
        return Batch(torch.stack(images), torch.stack(labels), "kept")

    loaders = [DataLoader(dataset(n), batch_size=16, collate_fn=collate) for n in (96, 32)]
    module, callback = Structured(), pruning()
    before = n_params(module)
    fit(module, callback, trainer, *loaders, num_sanity_val_steps=sanity)
    assert n_params(module) <= 0.4 * before
    (example,) = callback.pruner.example_inputs
    assert example.image.shape == (1, 3, 8, 8)
    assert example.note == "kept"


class Pictures(OneNetwork):
    """Takes a list of images, as detection models do: no tensor of it has a dimension of samples."""

    def forward(self, images):
        return self.model(torch.stack(images))

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self(batch[0]), torch.stack([target["label"] for target in batch[1]]))

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self.training_step(batch, batch_idx), batch_size=len(batch[0]))


class InParts(Pictures):
    """The step calls two networks, so it is replayed."""

    def __init__(self):
        super().__init__()
        self.model, self.head = self.model[:-1], nn.Linear(64, CLASSES)

    def training_step(self, batch, batch_idx):
        logits = self.head(torch.relu(self.model(torch.stack(batch[0]))))
        return F.cross_entropy(logits, torch.stack([target["label"] for target in batch[1]]))


@pytest.mark.parametrize("kind", [Pictures, InParts])
def test_lists_of_images(kind, pruning, trainer):
    def collate(rows):
        return [image for image, _ in rows], [{"label": label} for _, label in rows]

    loaders = [DataLoader(dataset(n), batch_size=16, collate_fn=collate) for n in (96, 32)]
    module, callback = kind(), pruning()
    before = n_params(module)
    fit(module, callback, trainer, *loaders)
    assert n_params(module) <= 0.4 * before


class Distilled(OwnForward):
    """forward is the student; the teacher is no less a part of the module."""

    def __init__(self):
        super().__init__()
        self.teacher = network().requires_grad_(False)

    def training_step(self, batch, batch_idx):
        return F.mse_loss(self(batch[0]), self.teacher(batch[0]))


def test_a_budget_that_a_part_keeps_out_of_reach_names_the_setting(pruning, trainer):
    advice = r"if not all of Distilled is to be pruned, modules=\[...\] names what is, of conv1, norm, conv2, fc, teacher"
    with pytest.raises(BudgetError, match=advice):
        fit(Distilled(), pruning(budget=Budget(params=0.3)), trainer)


class Student(Adam):
    """A frozen teacher that validation runs too."""

    def __init__(self):
        super().__init__()
        self.student, self.teacher = network(), network().requires_grad_(False)

    def training_step(self, batch, batch_idx):
        return F.mse_loss(self.student(batch[0]), self.teacher(batch[0]))

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self.training_step(batch, batch_idx))


def test_frozen_parts_are_named_before_they_are_cut(pruning, trainer, capsys):
    fit(Student(), pruning(), trainer, max_epochs=2)
    said = " ".join(capsys.readouterr().out.split())
    assert "all of Student is pruned, also what is frozen (teacher); if that is a teacher or a loss" in said
    assert "name what is to be pruned: modules=['student']" in said
    module = Student()
    fit(module, pruning(modules=["student"]), trainer, max_epochs=4)
    assert "frozen" not in capsys.readouterr().out
    assert n_params(module.student) <= 0.4 * n_params(module.teacher)


# networks that are copies of others


class Momentum(Adam):
    """A query encoder that is trained, a key encoder that follows it; only the first is validated."""

    def __init__(self):
        super().__init__()
        self.query = nn.Sequential(
            nn.Conv2d(3, 12, 3), nn.ReLU(), nn.Flatten(), nn.Linear(432, 16), nn.ReLU(), nn.Linear(16, 4)
        )
        self.key = copy.deepcopy(self.query).requires_grad_(False)

    @torch.no_grad()
    def on_train_batch_start(self, batch, batch_idx):
        for slow, fast in zip(self.key.parameters(), self.query.parameters(), strict=True):
            slow.data = 0.9 * slow.data + 0.1 * fast.data

    def training_step(self, batch, batch_idx):
        return F.mse_loss(self.query(batch[0]), self.key(batch[0])) + F.cross_entropy(self.query(batch[0]), batch[1])

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", F.cross_entropy(self.query(batch[0]), batch[1]))


def test_a_momentum_encoder_follows_where_it_is_named(pruning, trainer, tmp_path):
    module = Momentum()
    start = copy.deepcopy(module)
    options = {"copies": {"key": "query"}, "schedule": Schedule("linear", start=1, interval=1, steps=2)}
    callback, saved = pruning(**options), ModelCheckpoint(tmp_path / "all", "{epoch}", save_top_k=-1)
    trainer(callback, saved, enable_checkpointing=True).fit(module, loader(), loader(32, 1))
    assert [p.shape for p in module.query.parameters()] == [p.shape for p in module.key.parameters()]
    assert not any(p.requires_grad for p in module.key.parameters())
    assert record_of(module.query).removed == record_of(module.key).removed
    assert module.query[0].out_channels < 12
    for epoch in (0, 2, 4):
        resumed = copy.deepcopy(start)
        trainer(pruning(**options)).fit(resumed, loader(), loader(32, 1), ckpt_path=tmp_path / "all" / f"epoch={epoch}.ckpt")
        assert all(torch.equal(value, module.state_dict()[name]) for name, value in resumed.state_dict().items())


def test_without_the_name_the_message_says_what_to_do(pruning, trainer, capsys):
    with pytest.raises(RuntimeError, match="must match the size of tensor"):
        fit(Momentum(), pruning(), trainer)
    assert "momentum encoder: copies={'copy': 'original'}" in capsys.readouterr().out


class Served(Adam):
    """Trains a network and validates the average of its weights."""

    def __init__(self):
        super().__init__()
        self.net = network()
        self.average = copy.deepcopy(self.net).requires_grad_(False)

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self.net(batch[0]), batch[1])

    @torch.no_grad()
    def on_train_batch_end(self, *args):
        for average, value in zip(self.average.parameters(), self.net.parameters(), strict=True):
            average.lerp_(value, 0.5)

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", F.cross_entropy(self.average(batch[0]), batch[1]))


@pytest.mark.parametrize("modules", [["average"], None])
@pytest.mark.parametrize("copies", [{"average": "net"}, {"net": "average"}])
def test_the_trained_network_follows_an_average_that_validation_runs(copies, modules, pruning, trainer):
    options = {"copies": copies}
    with pytest.raises(ConfigError, match=r"never ran 'net'.*if it runs average instead, name that: modules=\['average'\];"):
        fit(Served(), pruning(modules=["net"], **options), trainer)
    module, run = Served(), trainer(callback := pruning(modules=modules, **options))
    run.fit(module, loader(), loader(32, 1))
    assert callback.stopped["reason"] == "budget"
    assert [p.shape for p in module.net.parameters()] == [p.shape for p in module.average.parameters()]
    (optimizer,) = run.optimizers
    ours = {id(p) for p in module.net.parameters()}
    assert ours <= {id(p) for p in optimizer.param_groups[0]["params"]}
    assert all(optimizer.state[p]["exp_avg"].shape == p.shape for p in module.net.parameters())


class Averaged(OneNetwork):
    """torch's own average inside the LightningModule; validation uses it, or not."""

    def __init__(self, validated):
        super().__init__()
        self.ema = AveragedModel(self.model, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True)
        self.validated = validated

    def on_before_zero_grad(self, optimizer):
        self.ema.update_parameters(self.model)

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", F.cross_entropy(self.model(batch[0]), batch[1]))
        if self.validated and not self.trainer.sanity_checking:
            with torch.no_grad():
                self.log("ema_loss", F.cross_entropy(self.ema.module(batch[0]), batch[1]))


class OtherRuns(Averaged):
    """Validates one of the two only."""

    def __init__(self, runs):
        super().__init__(validated=False)
        self.runs = runs

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", F.cross_entropy(self.get_submodule(self.runs)(batch[0]), batch[1]))


@pytest.mark.parametrize(
    ("named", "runs"), [("model", "ema"), ("ema", "model"), ("ema.module", "model"), ("model.4", "ema.module.4")]
)
def test_what_runs_in_place_of_a_named_network_is_named(named, runs, pruning, trainer):
    outer = runs.partition(".")[0]
    with pytest.raises(ConfigError, match=rf"never ran '{named}'.*if it runs {runs} instead, name that: modules=\['{runs}'\];"):
        fit(OtherRuns(outer), pruning(modules=[named]), trainer)
    if outer == runs:
        fit(OtherRuns(outer), callback := pruning(modules=[runs]), trainer)
        assert callback.stopped["reason"] == "budget"


@pytest.mark.parametrize("validated", [False, True])
def test_an_averaged_model_inside_follows(validated, pruning, trainer):
    module, callback = Averaged(validated), pruning(modules=["model"] if validated else None)
    fit(module, callback, trainer)
    assert module.model[0].out_channels < 12
    for live, mean in zip(module.model.parameters(), module.ema.module.parameters(), strict=True):
        assert live.shape == mean.shape
        assert not torch.equal(live, mean)


class Tied(Adam):
    """The decoder's last layer is the encoder's first weight."""

    def __init__(self):
        super().__init__()
        self.encoder, self.decoder = perceptron(192, 24, 6), perceptron(6, 192, 24)
        self.decoder[2].weight = self.encoder[0].weight

    def training_step(self, batch, batch_idx):
        return self.decoder(self.encoder(batch[0].flatten(1))).square().mean()

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self.training_step(batch, batch_idx))


REFUSED = {
    "unknown": (
        Autoencoder,
        {"modules": ["encode"]},
        "modules names 'encode', which Autoencoder does not have; it has encoder",
    ),
    "nested": (Autoencoder, {"modules": ["encoder", "encoder.0"]}, "'encoder.0' and 'encoder', which holds it"),
    "twice": (Autoencoder, {"modules": ["encoder", "encoder"]}, "name one of the two"),
    "empty": (Autoencoder, {"modules": ["encoder.1"]}, "'encoder.1', which has no parameters"),
    "shared": (Tied, {"modules": ["encoder"]}, r"encoder.0.weight is also decoder.2.weight, outside encoder"),
    "copy of nothing": (Momentum, {"copies": {"key": "quer"}}, "copies names 'quer'"),
    "all is a copy": (
        Momentum,
        {"copies": {"key": ""}},
        "copies={'key': ''}: '' is all of Momentum, which holds copy and original; name networks in it",
    ),
    "no copy": (Autoencoder, {"copies": {"decoder": "encoder"}}, "decoder does not have the parameters of encoder"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_with_the_way_out(case, pruning, trainer):
    kind, options, match = REFUSED[case]
    with pytest.raises(ConfigError, match=match):
        fit(kind(), pruning(**options), trainer)


def test_a_module_that_validation_never_runs_is_refused(pruning, trainer):
    class Idle(Autoencoder):
        def validation_step(self, batch, batch_idx):
            self.log("val_loss", self.encoder(batch[0].flatten(1)).mean())

    with pytest.raises(ConfigError, match="validation never ran 'decoder'"):
        fit(Idle(), pruning(modules=["encoder", "decoder"]), trainer)


def test_a_name_is_not_taken_letter_by_letter(pruning):
    with pytest.raises(ConfigError, match=r"modules='encoder' must be a list of names, e.g. \['encoder'\]"):
        pruning(modules="encoder")
    with pytest.raises(ConfigError, match=r"modules=\[\] names nothing to prune; leave it at null"):
        pruning(modules=[])
