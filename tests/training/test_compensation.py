"""Least squares while training: the refit is that of the network which was validated, and survives a checkpoint."""

import copy

import numpy as np
import pytest
import torch
from lightning import Callback, LightningModule
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from actprune.compensation import LeastSquares
from actprune.core.budget import Budget
from actprune.criteria import RMS
from actprune.schedule import Schedule

EXACT = LeastSquares(ridge=1e-10, positions=10**6)
TWO_STEPS = Schedule("linear", start=0, interval=2, steps=2)


class Chain(LightningModule):
    """Two hidden layers; the second reads the first through a tanh, without a bias."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(6, 14), nn.Tanh(), nn.Linear(14, 10, bias=False), nn.Tanh(), nn.Linear(10, 3))

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch, batch_idx):
        self.log("quality", (self(batch[0]).argmax(1) == batch[1]).float().mean())

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)

    def train_dataloader(self):
        return loader(96, 1)

    def val_dataloader(self):
        return loader(150, 2, batch_size=40)


def loader(n, seed, batch_size=16):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 6, generator=generator)
    return DataLoader(TensorDataset(x, (x[:, 0] > 0).long() + (x[:, 1] > 0).long()), batch_size)


class Cuts(Callback):
    """The network and its momentum buffers right before and right after every cut; stands behind the pruning callback."""

    def __init__(self):
        self.seen = []
        self.before = None

    def on_validation_end(self, trainer, pl_module):
        if not trainer.sanity_checking:
            self.before = self.state(trainer, pl_module)

    def on_train_epoch_start(self, trainer, pl_module):
        if self.before is not None and pl_module.net[0].out_features != self.before[0][0].out_features:
            self.seen.append((self.before, self.state(trainer, pl_module)))

    def state(self, trainer, module):
        (optimizer,) = trainer.optimizers
        momentum = {name: optimizer.state[p].get("momentum_buffer") for name, p in module.net.named_parameters()}
        return copy.deepcopy(module.net).eval(), copy.deepcopy(momentum)


def survivors(before, after, layer):
    """Positions of the units that stayed: their rows were changed by nothing but the fold, their biases not at all."""
    if before[layer].bias is None:
        return list(range(before[layer].out_features))
    return [before[layer].bias.tolist().index(value) for value in after[layer].bias.tolist()]


def test_every_refit_is_lstsq_on_what_validation_saw(pruning, trainer):
    cuts = Cuts()
    callback = pruning(criterion=RMS(), budget=Budget(params=0.45), schedule=TWO_STEPS, compensation=EXACT)
    trainer(callback, cuts).fit(Chain())
    assert len(cuts.seen) == len(callback.events) == 2
    x = torch.cat([batch for batch, _ in loader(150, 2, batch_size=40)])
    for (before, momentum), (after, smaller) in cuts.seen:
        hidden = before[:2](x).detach().double()
        stayed = survivors(before, after, 0)
        assert 0 < len(stayed) < before[0].out_features
        read = torch.cat([hidden[:, stayed], torch.ones(len(x), 1, dtype=torch.float64)], 1).numpy()
        said = hidden.numpy() @ before[2].weight.detach().double().numpy().T
        if before[2].bias is not None:
            said = said + before[2].bias.detach().double().numpy()
        solution = np.linalg.lstsq(read, said, rcond=None)[0]
        bias = after[2].bias.detach().numpy()
        rows = [int(np.abs(solution[-1] - value).argmin()) for value in bias]
        np.testing.assert_allclose(after[2].weight.detach().numpy(), solution[:-1, rows].T, rtol=1e-3, atol=1e-4)
        np.testing.assert_allclose(bias, solution[-1, rows], rtol=1e-3, atol=1e-4)
        kept = momentum["2.weight"][rows][:, stayed]
        assert torch.equal(smaller["2.weight"], kept)


def test_a_refit_costs_less_than_folding_the_mean_or_nothing(pruning, trainer):
    """The same seed trains the same network up to the first cut."""
    x = torch.cat([batch for batch, _ in loader(150, 2)])
    errors = []
    for how in (EXACT, LeastSquares(memory=0), None):
        cuts = Cuts()
        once = Schedule("linear", start=0, interval=2, steps=1)
        trainer(pruning(criterion=RMS(), budget=Budget(params=0.5), schedule=once, compensation=how), cuts).fit(Chain())
        ((before, _), (after, _)) = cuts.seen[0]
        errors.append(float((before(x) - after(x)).detach().square().mean()))
    refit, mean, plain = errors
    assert refit < 0.5 * mean
    assert mean < plain


@pytest.mark.filterwarnings("ignore:Checkpoint directory")
def test_a_checkpoint_between_decision_and_cut_carries_the_refit(pruning, trainer, tmp_path):
    def run(ckpt_path=None):
        module = Chain()
        callback = pruning(criterion=RMS(), budget=Budget(params=0.45), schedule=TWO_STEPS, compensation=LeastSquares())
        saved = ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1, enable_version_counter=False)
        trainer(callback, saved, enable_checkpointing=True).fit(module, ckpt_path=ckpt_path)
        return module, callback.pruner.record.to_dict()

    whole, record = run()
    first = torch.load(tmp_path / "epoch=0.ckpt", weights_only=False)
    (plans,) = [state["_plans"] for name, state in first["callbacks"].items() if name.startswith("PruningCallback")]
    (plan,) = plans.values()
    assert any(name.endswith("2.weight") for name in plan["shifts"])
    resumed, again = run(ckpt_path=tmp_path / "epoch=0.ckpt")
    assert again == record
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters(), strict=True))


@pytest.mark.parametrize("precision", ["bf16-mixed", "64-true"])
def test_other_precisions(precision, pruning, trainer):
    module = Chain()
    callback = pruning(criterion=RMS(), budget=Budget(params=0.45), schedule=TWO_STEPS, compensation=LeastSquares())
    trainer(callback, precision=precision).fit(module)
    assert callback.stopped["reason"] == "budget"
    assert all(p.isfinite().all() for p in module.parameters())
