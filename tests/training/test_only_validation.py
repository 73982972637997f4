"""What is observed is what ``validation_step`` runs, and running it again leaves nothing in what the user counts."""

import copy

import numpy as np
import pytest
import torch
from lightning import Callback
from torchmetrics import MeanMetric

from actprune.criteria import Entropy, Taylor
from foreign import OneNetwork, loader

SHAPE = next(iter(loader(1)))[0].shape[1:]
HOOKS = ["validation_start", "validation_epoch_start", "validation_batch_start", "validation_batch_end", "validation_epoch_end"]


class Draws(Callback):
    """Runs the network on inputs of its own: previews, adversarial examples."""

    def __init__(self, hook):
        setattr(self, f"on_{hook}", self._draw)

    def _draw(self, trainer, module, *args, **kwargs):
        with torch.no_grad(), torch.random.fork_rng():
            module.model(100 * torch.randn(64, *SHAPE))


def removed(trainer, pruning, *others, first=True):
    torch.manual_seed(0)
    module, callback = OneNetwork(), pruning(criterion=Entropy(bins=16))
    callbacks = [*others, callback] if first else [callback, *others]
    trainer(*callbacks, max_epochs=3).fit(module, loader(), loader(32, 1))
    assert callback.events
    return callback.pruner.record.to_dict()


@pytest.mark.parametrize("first", [True, False])
def test_what_other_callbacks_run_is_not_observed(first, pruning, trainer):
    alone = removed(trainer, pruning)
    for hook in HOOKS:
        assert removed(trainer, pruning, Draws(hook), first=first) == alone, hook


class Counts(OneNetwork):
    """Counts samples in every way in which people do."""

    def __init__(self):
        super().__init__()
        self.lists, self.tensor, self.array, self.metrics = [[]], torch.zeros(()), np.zeros(1), [MeanMetric()]
        self.meter = type("Meter", (), {"__module__": __name__})()
        self.meter.seen = 0

    def validation_step(self, batch, batch_idx):
        n = len(batch[0])
        self.lists[0] += [1] * n
        self.tensor += n
        self.array += n
        self.metrics[0].update(torch.tensor(float(n)))
        self.meter.seen += n
        return super().validation_step(batch, batch_idx)

    def on_validation_epoch_end(self):
        counted = len(self.lists[0]), int(self.tensor), int(self.array[0]), self.meter.seen, float(self.metrics[0].weight)
        vars(self).setdefault("counted", []).append(counted)
        self.lists[0].clear()
        self.tensor.zero_()
        self.array[:] = 0
        self.meter.seen = 0
        self.metrics[0].reset()


@pytest.mark.parametrize("criterion", [Entropy(bins=16), Taylor()], ids=["entropy", "taylor"])
@pytest.mark.parametrize("checks", [0, 2])
def test_nothing_is_counted_twice(criterion, checks, pruning, trainer):
    plain, watched, callback = Counts(), Counts(), pruning(criterion=criterion)
    for module, callbacks in ((plain, []), (watched, [callback])):
        trainer(*callbacks, max_epochs=4, num_sanity_val_steps=checks).fit(module, loader(), loader(32, 1))
    assert callback.events
    assert watched.counted == plain.counted


def test_a_copy_made_while_observed_runs_its_own_step(pruning, trainer):
    class Copies(Callback):
        def on_validation_batch_end(self, trainer, module, *args):
            self.twin = copy.deepcopy(module)

    module, copies = OneNetwork(), Copies()
    trainer(copies, pruning(), max_epochs=2).fit(module, loader(), loader(32, 1))
    assert copies.twin.validation_step.__self__ is copies.twin
    assert "validation_step" not in vars(module)


class Decorated(OneNetwork):
    @torch.no_grad()
    def validation_step(self, batch):
        self.log("val_loss", self.model(batch[0]).logsumexp(1).mean())


def test_a_decorated_step_gets_the_arguments_that_it_takes(pruning, trainer):
    callback = pruning()
    trainer(callback, max_epochs=3).fit(Decorated(), loader(), loader(32, 1))
    assert callback.events
