"""Criteria of labels and gradients in the callback: what they are given, what they leave alone, what they refuse."""

import numpy as np
import pytest
import torch
from lightning import LightningDataModule
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from actprune import Budget, criteria
from actprune.core.errors import ConfigError, ObservationError
from actprune.core.labels import class_labels
from actprune.models.small_cnn import SmallCNN
from actprune.pruning.batches import observe_pairs
from actprune.schedule import Schedule
from actprune.training import ClassificationTask
from foreign import CLASSES, Adam, OneNetwork, OwnForward, SeveralParts, dataset, loader
from foreign import network as build_network

EVERY = [
    criteria.Taylor(),
    criteria.Sensitivity(),
    criteria.Sensitivity("lower_bound"),
    criteria.LabelInformation(classes=CLASSES),
    criteria.FLAP(),
    criteria.Wanda(),
]
KINDS = [(OwnForward, loader), (OneNetwork, loader), (SeveralParts, SeveralParts.loader)]


def n_params(module):
    return sum(p.numel() for p in module.parameters())


@pytest.mark.parametrize(("kind", "load"), KINDS, ids=[kind.__name__ for kind, _ in KINDS])
@pytest.mark.parametrize("criterion", EVERY, ids=repr)
def test_every_kind_of_module_is_pruned(criterion, kind, load, pruning, trainer):
    module = kind()
    before = n_params(module)
    trainer(pruning(criterion=criterion)).fit(module, load(), load(36, 1))
    assert n_params(module) <= 0.4 * before


def first_observation(monkeypatch, module, callback, fitted, train, val):
    """The statistics of the first step, and the network as it was then."""
    kept = []
    decide = type(callback).on_validation_end

    def spy(self, trainer, pl_module):
        if self._observer is not None and not kept:
            kept.append((self._observer.observations, {k: v.clone() for k, v in pl_module.state_dict().items()}))
        decide(self, trainer, pl_module)

    monkeypatch.setattr(type(callback), "on_validation_end", spy)
    fitted.fit(module, train, val)
    return kept[0]


@pytest.mark.parametrize("criterion", EVERY[:4], ids=repr)
def test_the_callback_observes_what_the_library_does(criterion, pruning, trainer, monkeypatch):
    """The validation set in one pass by hand, on the network of that epoch."""
    callback = pruning(criterion=criterion, compensation=None, positions=None, budget=Budget(params=0.5))
    module = OneNetwork()
    observations, state = first_observation(monkeypatch, module, callback, trainer(callback), loader(), loader(37, 1))
    twin = build_network()
    twin.load_state_dict({name.removeprefix("model."): v for name, v in state.items()})
    x, y = dataset(37, 1).tensors
    from actprune import Pruner

    pruner = Pruner(twin, x[:1], criterion, Budget(params=0.5), compensation=None, positions=None)
    expected = observe_pairs(pruner, [(x, y)])
    ((key, _),) = criterion.statistics().items()
    checked = 0
    for group in pruner.graph.unlocked:
        for ours, theirs in zip(observations["model"].scores[group.name][key], expected.scores[group.name][key], strict=True):
            assert ours.n_samples == theirs.n_samples == 37
            torch.testing.assert_close(ours.compute(), theirs.compute(), rtol=1e-4, atol=1e-9)
            checked += 1
    assert checked == 2


def test_training_goes_on_as_without_gradients(pruning, trainer):
    """The same plans, so the same training: random numbers, metrics and attributes are as if nothing had been run."""

    class Restless(SeveralParts):
        def __init__(self):
            super().__init__()
            self.drop, self.steps, self.seen = nn.Dropout(0.3), 0, []

        def training_step(self, batch, batch_idx):
            self.steps += 1
            self.seen.append(float(np.random.rand()))
            self.log("train/loss", torch.zeros(()))
            noisy = {**batch, "image": self.drop(batch["image"]) + torch.rand(1)}
            return self.step(noisy)[1]

    class Quiet(criteria.Taylor):
        """Observes gradients and ranks by magnitude."""

        def score(self, view):
            return criteria.Magnitude().score(view)

    found = []
    for criterion in (criteria.Magnitude(), Quiet()):
        torch.manual_seed(0)
        np.random.seed(0)
        module = Restless()
        trainer(pruning(criterion=criterion)).fit(module, module.loader(), module.loader(36, 1))
        assert all(p.grad is None or p.grad.shape == p.shape for p in module.parameters())
        found.append((module.state_dict(), module.steps, module.seen))
    assert found[0][1:] == found[1][1:]
    assert all(torch.equal(value, found[1][0][name]) for name, value in found[0][0].items())


class Manual(OneNetwork):
    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(F.cross_entropy(self.model(batch[0]), batch[1]))
        optimizer.step()


def test_manual_optimization_needs_a_loss(pruning, trainer):
    with pytest.raises(ConfigError, match=r"Taylor differentiates the loss, and Manual steps its optimizers itself .* loss="):
        trainer(pruning(criterion=criteria.Taylor())).fit(Manual(), loader(), loader(32, 1))
    module = Manual()
    before = n_params(module)
    given = pruning(criterion=criteria.Taylor(), loss=lambda task, batch: F.cross_entropy(task.model(batch[0]), batch[1]))
    trainer(given).fit(module, loader(), loader(32, 1))
    assert n_params(module) <= 0.4 * before


def test_a_loss_that_is_given_takes_the_place_of_the_step(pruning, trainer, monkeypatch):
    class Broken(OneNetwork):
        """Its training batches look different from those of validation."""

        def training_step(self, batch, batch_idx):
            return F.cross_entropy(self.model(batch["x"]), batch["y"])

    images, labels = dataset().tensors
    rows = [{"x": x, "y": y} for x, y in zip(images, labels, strict=True)]
    train = DataLoader(rows, batch_size=16)
    with pytest.raises(
        ObservationError, match=r"training_step does not run on a validation batch.*TypeError.*PruningCallback loss="
    ):
        trainer(pruning(criterion=criteria.Taylor())).fit(Broken(), train, loader(32, 1))
    seen = []

    def loss(task, batch):
        assert not task.training
        assert torch.is_grad_enabled()
        seen.append(len(batch[0]))
        return F.cross_entropy(task.model(batch[0]), batch[1])

    trainer(pruning(criterion=criteria.Taylor(), loss=loss, schedule=Schedule(steps=1))).fit(Broken(), train, loader(36, 1))
    assert seen == [16, 16, 4]


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        (None, "the loss must be one number with a gradient, the mean over the batch; got NoneType"),
        ("per sample", r"got a tensor of shape \(16,\)"),
        ("detached", r"got a tensor of shape \(\) without a gradient"),
    ],
)
def test_a_step_that_returns_no_loss_says_so(returned, message, pruning, trainer):
    class Odd(OneNetwork):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            if self.training:
                return loss
            return {None: None, "per sample": loss.expand(16), "detached": loss.detach()}[returned]

    with pytest.raises(ObservationError, match=message):
        trainer(pruning(criterion=criteria.Taylor())).fit(Odd(), loader(), loader(32, 1))


def test_a_step_may_take_the_batch_alone_and_return_a_dict(pruning, trainer):
    class Short(OneNetwork):
        def training_step(self, batch):
            return {"loss": F.cross_entropy(self.model(batch[0]), batch[1]), "more": batch[1]}

    module = Short()
    before = n_params(module)
    trainer(pruning(criterion=criteria.Taylor())).fit(module, loader(), loader(32, 1))
    assert n_params(module) <= 0.4 * before


class Unlabelled(OneNetwork):
    def validation_step(self, batch, batch_idx):
        self.model(batch[0])


class InParts(OneNetwork):
    def validation_step(self, batch, batch_idx):
        self.model[3:](self.model[:3](batch[0]))


class Flipped(OneNetwork):
    """Two rows per sample."""

    def validation_step(self, batch, batch_idx):
        self.model(torch.cat([batch[0], batch[0].flip(3)]))


IMAGES_ALONE = DataLoader(TensorDataset(dataset(32, 1).tensors[0]), batch_size=16)
WITHOUT = {
    "one network": (Unlabelled, IMAGES_ALONE, {}, 16),
    "parts": (InParts, IMAGES_ALONE, {}, 16),
    "a named one": (Unlabelled, IMAGES_ALONE, {"modules": ["model"]}, 16),
    "two rows per sample": (Flipped, loader(32, 1), {}, 32),
}


@pytest.mark.parametrize("sanity", [1, 0])
@pytest.mark.parametrize("case", WITHOUT)
def test_labels_that_are_not_there_are_asked_for_before_training(case, sanity, pruning, trainer):
    kind, validation, options, n = WITHOUT[case]
    callback = pruning(criterion=criteria.LabelInformation(classes=CLASSES), **options)
    run = trainer(callback, num_sanity_val_steps=sanity)
    with pytest.raises(
        ObservationError, match=rf"a validation batch of type list holds no vector of {n} integers; let it be \(inp"
    ):
        run.fit(kind(), loader(), validation)
    assert run.global_step == 0


LABELS, OTHER, IMAGES = torch.tensor([1, 0, 2]), torch.tensor([9, 9, 9]), torch.zeros(3, 2)


@pytest.mark.parametrize(
    ("batch", "found"),
    [
        ([IMAGES, LABELS], True),
        ((IMAGES, LABELS, OTHER), True),
        ((IMAGES, IMAGES, LABELS), True),
        ((OTHER, LABELS), True),
        ((LABELS, IMAGES), False),
        ({"x": OTHER, "labels": LABELS, "y": OTHER}, True),
        ({"x": IMAGES, "label": LABELS}, True),
        ({"target": LABELS, "y": OTHER}, True),
        ({"labels": LABELS.float(), "targets": LABELS}, True),
        ({"class": LABELS}, False),
        ((IMAGES, {"boxes": OTHER, "labels": LABELS}), True),
        (({"input_ids": OTHER, "labels": LABELS}, 3), True),
        ((IMAGES, LABELS[:2]), False),
        ((IMAGES, LABELS[:, None]), False),
        (IMAGES, False),
        (LABELS, False),
        ((), False),
    ],
)
def test_labels_are_looked_for_in_a_documented_order(batch, found):
    assert class_labels(batch, 3) is (LABELS if found else None)


class Digits(LightningDataModule):
    """A thousand scans to learn from and 300 to validate on."""

    def __init__(self):
        super().__init__()
        images, labels = load_digits(return_X_y=True)
        self.images, self.labels = torch.tensor(images / 16).float().view(-1, 1, 8, 8), torch.tensor(labels)

    def part(self, rows, **options):
        return DataLoader(TensorDataset(self.images[rows], self.labels[rows]), batch_size=64, **options)

    def train_dataloader(self):
        return self.part(slice(0, 1000), shuffle=True)

    def val_dataloader(self):
        return self.part(slice(1000, 1300))


@pytest.mark.parametrize(
    "criterion", [criteria.Taylor(), pytest.param(criteria.LabelInformation(), marks=pytest.mark.slow)], ids=repr
)
def test_the_digits_end_to_end(criterion, pruning, trainer):
    torch.manual_seed(0)
    module = ClassificationTask(SmallCNN(num_classes=10), lambda p: torch.optim.Adam(p, lr=3e-3), num_classes=10)
    callback = pruning(criterion=criterion, budget=Budget(params=0.5))
    fitted = trainer(callback, max_epochs=6)
    fitted.fit(module, Digits())
    assert callback.pruner.params <= 0.5 * callback.pruner.params_before
    assert len(callback.pruner.record.steps) >= 2
    assert fitted.callback_metrics["val/accuracy"] > 0.9


class TwoNetworks(Adam):
    """Two networks that are pruned apart; both take part in the loss."""

    def __init__(self):
        super().__init__()
        self.one, self.two = build_network(), build_network()

    def both(self, batch):
        return self.one(batch[0]) + self.two(batch[0])

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self.both(batch), batch[1])

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", F.cross_entropy(self.both(batch), batch[1]))


@pytest.mark.parametrize("criterion", EVERY[:2], ids=repr)
def test_several_networks_do_not_see_each_others_second_run(criterion, pruning, trainer, monkeypatch):
    callback = pruning(criterion=criterion, modules=["one", "two"])
    module = TwoNetworks()
    observations, _ = first_observation(monkeypatch, module, callback, trainer(callback), loader(), loader(36, 1))
    for observation in observations.values():
        assert observation.n_samples == 36
        statistics = [s for keys in observation.scores.values() for sites in keys.values() for s in sites]
        assert statistics
        assert all(s.n_samples == 36 for s in [*statistics, *(s for _, s in observation.folds.values())])
    assert all(p.params <= 0.4 * p.params_before for p in callback.pruners.values())
