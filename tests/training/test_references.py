"""Parameters that the module holds besides its layers: lists of its own, optimizers that it steps itself."""

import pytest
import torch
from lightning import Callback
from torch.nn import functional as F

from actprune.core.budget import Budget
from foreign import OneNetwork, loader


class Penalty:
    """No module."""

    def __init__(self, parameters):
        self.parameters = list(parameters)
        self.first = self.parameters[0]


class Lists(OneNetwork):
    """Regularises a list of parameters."""

    def configure_optimizers(self):
        matrices = [p for p in self.model.parameters() if p.dim() > 1]
        self.regularised, self.pairs, self.by_name = matrices, (matrices[0], {matrices[1]}), {"last": [matrices[2]]}
        self.penalty = Penalty(matrices)
        return super().configure_optimizers()

    def training_step(self, batch, batch_idx):
        return super().training_step(batch, batch_idx) + 1e-4 * sum(p.abs().sum() for p in self.regularised)


class Follow(Callback):
    def on_train_start(self, trainer, pl_module):
        self.optimizer = torch.optim.SGD(pl_module.model[0].parameters(), 0.001)
        self.statistics = {pl_module.model[1].running_mean: pl_module.model[0].weight}


def test_lists_of_parameters_follow(pruning, trainer):
    module, callback, other = Lists(), pruning(), Follow()
    trainer(other, callback).fit(module, loader(), loader(32, 1))
    assert callback.stopped["reason"] == "budget"
    first, second, third = (p for p in module.model.parameters() if p.dim() > 1)
    for ours, layers in zip(module.regularised, (first, second, third), strict=True):
        assert ours is layers
    assert module.pairs[0] is first
    assert module.pairs[1] == {second}
    assert module.by_name["last"][0] is third
    assert module.penalty.parameters[1] is second
    assert module.penalty.first is first
    ((key, value),) = other.statistics.items()
    assert key is module.model[1].running_mean
    assert value is first
    assert other.optimizer.param_groups[0]["params"][0] is first


class OwnOptimizer(OneNetwork):
    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def configure_optimizers(self):
        self.own = {"all": torch.optim.SGD(self.model.parameters(), 0.05, momentum=0.9)}

    def training_step(self, batch, batch_idx):
        self.own["all"].zero_grad()
        self.manual_backward(F.cross_entropy(self.model(batch[0]), batch[1]))
        self.own["all"].step()


@pytest.mark.parametrize("guard", [{}, {"max_metric_drop": 0.0, "monitor": "val_loss", "budget": Budget(params=0.1)}])
@pytest.mark.filterwarnings("ignore:`LightningModule.configure_optimizers` returned `None`")
def test_an_optimizer_that_the_module_steps_itself_follows(guard, pruning, trainer):
    module, callback = OwnOptimizer(), pruning(**guard)
    trainer(callback, max_epochs=8).fit(module, loader(), loader(32, 1))
    assert any(event.get("went_back") for event in callback.events) == bool(guard)
    optimizer = module.own["all"]
    assert {id(p) for p in optimizer.param_groups[0]["params"]} == {id(p) for p in module.parameters()}
    assert set(optimizer.state) == set(module.parameters())
    for parameter, state in optimizer.state.items():
        assert state["momentum_buffer"].shape == parameter.shape
