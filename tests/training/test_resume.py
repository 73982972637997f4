"""Checkpoints: a pruned module comes back, and a resumed run is the uninterrupted run."""

import copy
import pickle
from functools import partial

import pytest
import torch
from lightning import Callback
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.utilities import CombinedLoader
from torch import nn
from torch.nn import functional as F

from actprune import apply_record, prune
from actprune.core.budget import Budget
from actprune.core.errors import ConfigError
from actprune.core.record import carry, record_of
from actprune.criteria import Magnitude
from actprune.schedule import Schedule
from actprune.training import RandomState
from actprune.training.resume import CheckpointHooks, Shapes
from foreign import CLASSES, Adam, OneNetwork, OwnForward, SeveralParts, loader

# the run that goes on writes no checkpoints of its own
pytestmark = pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")

KINDS = [(OwnForward, loader), (OneNetwork, loader), (SeveralParts, SeveralParts.loader)]


@pytest.fixture
def checkpoints(tmp_path):
    return lambda **options: ModelCheckpoint(tmp_path / "all", "{epoch}", save_top_k=-1, **options)


def assert_same_weights(one, other):
    ours, theirs = one.state_dict(), other.state_dict()
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        assert torch.equal(value, theirs[name]), name


@pytest.mark.parametrize("at_train_end", [True, False])
@pytest.mark.parametrize(("kind", "load"), KINDS)
def test_resume_is_exact_from_every_epoch(kind, load, at_train_end, pruning, trainer, checkpoints, tmp_path):
    """Before the first step, with a plan pending, between steps, after the last: the same weights, bit by bit."""
    schedule = Schedule("linear", start=1, interval=2, steps=2)
    whole, saved = kind(), checkpoints(save_on_train_epoch_end=at_train_end)
    start = copy.deepcopy(whole)
    full = pruning(schedule=schedule)
    trainer(full, saved, enable_checkpointing=True).fit(whole, load(), load(32, 1))
    for epoch in range(5):
        resumed, callback = copy.deepcopy(start), pruning(schedule=schedule)
        trainer(callback).fit(resumed, load(), load(32, 1), ckpt_path=tmp_path / "all" / f"epoch={epoch}.ckpt")
        assert_same_weights(resumed, whole)
        assert callback.history == full.history
        assert record_of(callback.pruner.model).to_dict() == record_of(full.pruner.model).to_dict()


class Lazy(OneNetwork):
    """Layers that get their shapes in the first validation."""

    def __init__(self):
        super().__init__()
        self.model = nn.Sequential(nn.LazyConv2d(12, 3), nn.LazyBatchNorm2d(), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
                                   nn.LazyLinear(16), nn.ReLU(), nn.LazyLinear(CLASSES))  # fmt: skip


@pytest.mark.filterwarnings("ignore:Lazy modules are a new feature")
@pytest.mark.filterwarnings("ignore:The total number of parameters detected may be inaccurate")
def test_lazy_layers_resume_too(pruning, trainer, checkpoints, tmp_path):
    schedule, whole, full = Schedule("linear", start=1, interval=2, steps=2), Lazy(), pruning()
    full.schedule = schedule
    trainer(full, checkpoints(), enable_checkpointing=True).fit(whole, loader(), loader(32, 1))
    assert len(full.events) == 2
    for epoch in range(5):
        resumed, callback = Lazy(), pruning(schedule=schedule)
        trainer(callback).fit(resumed, loader(), loader(32, 1), ckpt_path=tmp_path / "all" / f"epoch={epoch}.ckpt")
        assert_same_weights(resumed, whole)


class WithoutBiases(OneNetwork):
    """Compensation gives it biases; they end up in the group of the weights, where a fresh module would not put them."""

    def __init__(self, grouped):
        super().__init__()
        self.grouped = grouped
        self.model = nn.Sequential(nn.Conv2d(3, 12, 3, bias=False), nn.ReLU(), nn.Conv2d(12, 16, 3, bias=False), nn.ReLU(),
                                   nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, CLASSES, bias=False))  # fmt: skip
        self.scale = nn.Parameter(torch.ones(CLASSES))

    def configure_optimizers(self):
        if not self.grouped:
            return torch.optim.AdamW(self.parameters(), 0.01)
        weights, others = ([p for p in self.parameters() if (p.dim() > 1) == large] for large in (True, False))
        return torch.optim.AdamW([{"params": weights, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}], 0.01)

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", F.cross_entropy(self.model(batch[0]) * self.scale, batch[1]))


class Tokens(Adam):
    """An encoder whose heads may not leave; a trace of the cut network alone would let them."""

    def __init__(self):
        super().__init__()
        self.embed, self.first = nn.Linear(48, 32), nn.Parameter(torch.zeros(1, 1, 32))
        layer = nn.TransformerEncoderLayer(32, 4, 64, 0.1, "gelu", batch_first=True, norm_first=True)
        self.encoder, self.fc = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), nn.Linear(32, CLASSES)

    def forward(self, x):
        x = self.embed(x.reshape(len(x), 4, 48))
        return self.fc(self.encoder(torch.cat([self.first.expand(len(x), -1, -1), x], 1))[:, 0])

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self.training_step(batch, batch_idx))


@pytest.mark.parametrize("make", [partial(WithoutBiases, False), partial(WithoutBiases, True), Tokens])
def test_resume_between_steps_of_a_network_that_looks_different_once_cut(make, pruning, trainer, checkpoints, tmp_path):
    schedule = Schedule("linear", start=1, interval=2, steps=2)
    whole, full = make(), pruning(schedule=schedule, budget=Budget(params=0.5))
    start = copy.deepcopy(whole)
    trainer(full, RandomState(), checkpoints(), enable_checkpointing=True).fit(whole, loader(), loader(32, 1))
    assert len(full.events) == 2
    for epoch in (2, 4):
        resumed, callback = copy.deepcopy(start), pruning(schedule=schedule, budget=Budget(params=0.5))
        path = tmp_path / "all" / f"epoch={epoch}.ckpt"
        trainer(callback, RandomState()).fit(resumed, loader(), loader(32, 1), ckpt_path=path)
        assert_same_weights(resumed, whole)
        assert callback.history == full.history


def test_checkpoint_reloads_into_a_fresh_module(pruning, trainer, checkpoints, tmp_path):
    module = OwnForward()
    first = trainer(pruning(), checkpoints(), enable_checkpointing=True)
    first.fit(module, loader(), loader(32, 1))
    (expected,) = first.test(module, loader(32, 1), verbose=False)
    fresh = OwnForward()
    (found,) = trainer(pruning()).test(fresh, loader(32, 1), ckpt_path=tmp_path / "all" / "epoch=5.ckpt", verbose=False)
    assert found == expected
    assert fresh.conv2.in_channels == fresh.conv1.out_channels < 12


def test_earlier_checkpoint_loads_into_the_pruned_module(pruning, trainer, checkpoints, tmp_path):
    module = OneNetwork()
    schedule = Schedule("linear", start=1, interval=2, steps=2)
    fitted = trainer(pruning(schedule=schedule), checkpoints(), enable_checkpointing=True)
    fitted.fit(module, loader(), loader(32, 1))
    narrow = module.model[0].out_channels
    for epoch in (0, 3, 5, 2):
        path = tmp_path / "all" / f"epoch={epoch}.ckpt"
        fitted.validate(module, loader(32, 1), ckpt_path=path, verbose=False)
        state = torch.load(path, weights_only=True)["state_dict"]
        assert_same_weights(module, type("Saved", (), {"state_dict": lambda self, state=state: state})())
        assert module.model[0].out_channels == len(state["model.0.weight"]) == module.model[1].num_features
    assert narrow < module.model[0].out_channels < 12
    assert module.model[0](torch.ones(1, 3, 8, 8)).shape[1] == module.model[0].out_channels


def test_weights_only_checkpoints_carry_the_record(pruning, trainer, tmp_path):
    module = OneNetwork()
    fitted = trainer(pruning())
    fitted.fit(module, loader(), loader(32, 1))
    fitted.save_checkpoint(tmp_path / "weights.ckpt", weights_only=True)
    fresh = OneNetwork()
    trainer(pruning()).validate(fresh, loader(32, 1), ckpt_path=tmp_path / "weights.ckpt", verbose=False)
    assert_same_weights(fresh, module)


def test_hooks_of_the_class_still_run(pruning, trainer, tmp_path):
    class Hooked(OneNetwork):
        loaded = None

        def on_save_checkpoint(self, checkpoint):
            checkpoint["mine"] = 7

        def on_load_checkpoint(self, checkpoint):
            self.loaded = checkpoint["mine"], self.model[0].out_channels

    module = Hooked()
    fitted = trainer(pruning())
    fitted.fit(module, loader(), loader(32, 1))
    fitted.save_checkpoint(tmp_path / "one.ckpt")
    fresh = Hooked()
    trainer(pruning()).validate(fresh, loader(32, 1), ckpt_path=tmp_path / "one.ckpt", verbose=False)
    assert fresh.loaded == (7, module.model[0].out_channels)


def test_copies_and_pickles_have_hooks_of_their_own(pruning, trainer):
    module = OneNetwork()
    trainer(pruning()).fit(module, loader(), loader(32, 1))
    module.trainer = None
    for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert twin.on_load_checkpoint.__self__.task is twin


def test_without_the_original_shapes_the_error_is_clear():
    module = OneNetwork()
    hooks = CheckpointHooks(module)
    hooks.paths = ["model"]
    record = record_of(module.model)
    record.removed = {"0.weight": {0: [1]}}
    module.model._surgery_record = record
    with pytest.raises(ConfigError, match="pruned already and the checkpoint holds another shape"):
        hooks.load({})


def test_shapes_restore_a_bias_that_was_given_and_leave_counters():
    class Counter(nn.Module):
        def __init__(self):
            super().__init__()
            self.calls = 0
            self.conv = nn.Conv2d(3, 8, 1, bias=False)

    network = Counter()
    shapes = Shapes.of(network)
    network.calls = 5
    network.conv.out_channels = 4
    network.conv.weight = nn.Parameter(network.conv.weight[:4].detach())
    network.conv.bias = nn.Parameter(torch.ones(4))
    shapes.restore(network, record_of(network))
    assert network.calls == 5
    assert network.conv.out_channels == 8
    assert network.conv.bias is None
    assert network.conv(torch.ones(1, 3, 2, 2)).shape[1] == 8


def test_shapes_restore_tensors_that_are_plain_attributes():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second, self.scale = nn.Linear(3, 8), nn.Linear(8, 2), torch.rand(8)
            self.bank, self.last = torch.zeros(3), torch.zeros(3)

        def forward(self, x):
            return self.second(self.first(x) * self.scale)

    network, x = Scaled(), torch.randn(4, 3)
    shapes, values, before = Shapes.of(network), copy.deepcopy(network.state_dict()), network(x)
    prune(network, x, criterion=Magnitude(), budget=Budget(units=0.5))
    assert network.scale.shape == (4,)
    network.bank, network.last = torch.ones(5), None  # as a forward may write them
    shapes.restore(network, record_of(network))
    network.load_state_dict(values)
    assert torch.equal(network(x), before)
    assert network.bank.tolist() == [1] * 5


def test_best_values_restart_at_a_step(pruning, trainer, tmp_path):
    stop = EarlyStopping("val_loss", patience=100)
    best = ModelCheckpoint(tmp_path / "best", "{epoch}", monitor="val_loss", save_top_k=1)
    seen = {}

    class Look(Callback):
        def on_train_epoch_start(self, trainer, pl_module):
            seen[trainer.current_epoch] = (float(stop.best_score), best.best_model_path)

    schedule = Schedule("one_shot", start=2)
    trainer(pruning(schedule=schedule), stop, best, Look(), enable_checkpointing=True).fit(
        OwnForward(), loader(), loader(32, 1)
    )
    assert seen[2][0] < float("inf")
    assert seen[3] == (float("inf"), "")
    assert best.best_model_path
    assert int(best.best_model_path.rpartition("epoch=")[2].split(".")[0]) >= 3


def test_the_way_back_gives_a_part_its_own_record_again():
    model, x = nn.Sequential(nn.Sequential(nn.Linear(5, 12), nn.ReLU(), nn.Linear(12, 8)), nn.Linear(8, 3)), torch.randn(2, 5)
    options = {"criterion": Magnitude(), "compensation": None, "budget": Budget(units=0.6)}
    prune(model[0], x, **options)
    early, shapes, before = model.state_dict(), Shapes.of(model), record_of(model[0]).to_dict()
    early = {name: value.clone() for name, value in early.items()}
    record = prune(model, x, **options)
    twin = copy.deepcopy(model)
    assert not record_of(model[0])
    shapes.restore(model, record)
    carry(model, None)
    model.load_state_dict(early)
    assert record_of(model[0]).to_dict() == before
    apply_record(model, record)
    model.load_state_dict(twin.state_dict())
    assert torch.equal(model(x), twin(x))
    assert not record_of(model[0])


class Combined(OneNetwork):
    """Validated on batches of two loaders at once."""

    def validation_step(self, batch, batch_idx):
        super().validation_step(batch["one"], batch_idx)

    @staticmethod
    def loader():
        return CombinedLoader({"one": loader(32, 1), "other": loader(32, 2)}, "min_size")


class Prepared(OneNetwork):
    """Its step needs what is made when validation starts, also where it is replayed."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(CLASSES, CLASSES)

    def on_validation_start(self):
        self.seen = []

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self.head(self.model(batch[0])), batch[1])

    def validation_step(self, batch, batch_idx):
        self.seen.append(batch_idx)
        self.log("val_loss", self.training_step(batch, batch_idx))


class Two(OneNetwork):
    """The second of two networks is run by the second loader only."""

    def __init__(self):
        super().__init__()
        self.other = copy.deepcopy(self.model)

    def training_step(self, batch, batch_idx):
        return super().training_step(batch, batch_idx) + F.cross_entropy(self.other(batch[0]), batch[1])

    def validation_step(self, batch, batch_idx, dataloader_idx=0):
        self.log("val_loss", F.cross_entropy((self.model, self.other)[dataloader_idx](batch[0]), batch[1]))


@pytest.mark.parametrize(
    ("kind", "load", "options"),
    [
        (Combined, Combined.loader, {}),
        (Prepared, partial(loader, 32, 1), {}),
        (Two, lambda: [loader(32, 1), loader(32, 2)], {"modules": ["model", "other"]}),
    ],
)
def test_resume_is_exact_where_the_first_batch_alone_shows_nothing(
    kind, load, options, pruning, trainer, checkpoints, tmp_path
):
    options = {"schedule": Schedule("linear", start=1, interval=2, steps=2), **options}
    whole, full = kind(), pruning(**options)
    start = copy.deepcopy(whole)
    trainer(full, checkpoints(save_on_train_epoch_end=False), enable_checkpointing=True, max_epochs=5).fit(
        whole, loader(), load()
    )
    assert [event["epoch"] for event in full.events] == [2, 4]
    for epoch in range(4):
        resumed, callback = copy.deepcopy(start), pruning(**options)
        path = tmp_path / "all" / f"epoch={epoch}.ckpt"
        trainer(callback, max_epochs=5).fit(resumed, loader(), load(), ckpt_path=path)
        assert_same_weights(resumed, whole)
        assert callback.history == full.history


class Fed(OneNetwork):
    """Its step needs what a callback gives it."""

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", F.cross_entropy(self.model(batch[0]) / self.temperature, batch[1]))


class Feeder(Callback):
    def on_validation_start(self, trainer, pl_module):
        pl_module.temperature = 2.0


def test_validation_that_shows_the_networks_late_is_observed_from_its_first_batch_on(
    pruning, trainer, checkpoints, tmp_path, capsys
):
    """No step is lost; a plan that was to be executed at once waits for that validation, and the console says so."""
    options = {"schedule": Schedule("linear", start=1, interval=2, steps=2)}
    whole, full = Fed(), pruning(**options)
    start = copy.deepcopy(whole)
    trainer(full, Feeder(), checkpoints(save_on_train_epoch_end=False), enable_checkpointing=True).fit(
        whole, loader(), loader(32, 1)
    )
    for epoch, exact in ((0, True), (1, False), (2, True), (3, False)):
        capsys.readouterr()
        resumed, callback = copy.deepcopy(start), pruning(**options)
        path = tmp_path / "all" / f"epoch={epoch}.ckpt"
        trainer(callback, Feeder()).fit(resumed, loader(), loader(32, 1), ckpt_path=path)
        assert callback.stopped["reason"] == "budget"
        assert ("the pruning step that is due waits" in capsys.readouterr().out) is not exact
        if exact:
            assert_same_weights(resumed, whole)
            assert callback.history == full.history


class Pretrained(OneNetwork):
    """Trains a head on a frozen backbone that its checkpoints leave out."""

    def __init__(self):
        super().__init__()
        self.strict_loading = False
        self.model[:-1].requires_grad_(False)

    def state_dict(self, *args, **kwargs):
        return {name: value for name, value in super().state_dict(*args, **kwargs).items() if not name.startswith("model.0")}


def test_earlier_checkpoint_leaves_a_frozen_backbone_that_it_does_not_hold_whole(pruning, trainer, checkpoints, tmp_path):
    module = Pretrained()
    before = module.model[0].weight.clone()
    fitted = trainer(pruning(), checkpoints(), enable_checkpointing=True)
    fitted.fit(module, loader(), loader(32, 1))
    assert module.model[0].out_channels < 12
    fitted.validate(module, loader(32, 1), ckpt_path=tmp_path / "all" / "epoch=0.ckpt", verbose=False)
    assert torch.equal(module.model[0].weight, before)


def test_checkpoint_of_a_renamed_network_is_refused(pruning, trainer, tmp_path):
    fitted = trainer(pruning())
    fitted.fit(OneNetwork(), loader(), loader(32, 1))
    fitted.save_checkpoint(tmp_path / "one.ckpt")
    with pytest.raises(ConfigError, match="a pruned network 'model', which OwnForward does not have"):
        trainer(pruning()).validate(OwnForward(), loader(32, 1), ckpt_path=tmp_path / "one.ckpt", verbose=False)
