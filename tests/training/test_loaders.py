"""Looking for the network before training, where no sanity check runs, draws nothing that training would have drawn."""

import random

import numpy as np
import pytest
import torch
from lightning import Callback, seed_everything
from torch.utils.data import (
    BatchSampler,
    ConcatDataset,
    DataLoader,
    Dataset,
    RandomSampler,
    Sampler,
    StackDataset,
    Subset,
    WeightedRandomSampler,
    default_collate,
)
from torchvision.datasets import FakeData
from torchvision.transforms import Compose

from actprune.schedule import Schedule
from actprune.training.loaders import spared
from foreign import OneNetwork, dataset


class Weights(Callback):
    """What every epoch ends with."""

    def __init__(self):
        self.seen = []

    def on_train_epoch_end(self, trainer, module):
        self.seen.append(torch.cat([p.detach().flatten().clone() for p in module.parameters()]))

    def on_validation_epoch_end(self, trainer, module):
        self.seen.append(trainer.callback_metrics["val_loss"].clone())


class Noisy(Dataset):
    """Draws from generators of its own, and counts."""

    def __init__(self, n, seed):
        self.data, self.reads = dataset(n, seed), 0
        self.old, self.new, self.plain = np.random.RandomState(1), np.random.default_rng(2), random.Random(3)
        self.generator = torch.Generator().manual_seed(4)

    def __len__(self):
        return len(self.data)

    def __getitem__(self, index):
        self.reads += 1
        image, target = self.data[index]
        noise = self.old.randn() + self.new.normal() + self.plain.random() + torch.rand((), generator=self.generator)
        return image + 0.1 * float(noise) + 0.01 * self.reads, target


class Own(Sampler):
    """Deals out what comes next."""

    def __init__(self, n):
        self.n, self.orders, self.rng = n, [0], np.random.default_rng(5)

    def __len__(self):
        return self.n

    def __iter__(self):
        self.orders[0] += 1
        return iter(self.rng.permutation(self.n).tolist())


class Drawing:
    """A loader of one's own, a function that collates, a transform: what draws when it is used."""

    def __init__(self):
        self.rng, self.generators = np.random.default_rng(8), [torch.Generator().manual_seed(9)]

    def __len__(self):
        return 3

    def __iter__(self):
        images, targets = dataset(48, 1).tensors
        for _ in range(3):
            rows = torch.randperm(48, generator=self.generators[0])[:16]
            yield images[rows], targets[rows]

    def __call__(self, drawn):
        if not isinstance(drawn, list):
            return torch.full((3, 8, 8), float(self.rng.normal()))
        images, targets = default_collate(drawn)
        return images + float(self.rng.normal()), targets


class Batches(Sampler):
    """A batch sampler around another one."""

    def __init__(self, n):
        self.base = WeightedRandomSampler([1.0] * n, n, generator=torch.Generator().manual_seed(10))

    def __len__(self):
        return 3

    def __iter__(self):
        return iter(torch.tensor(list(self.base)).split(16))


def own_generator(data):
    return DataLoader(data, 16, shuffle=True, generator=torch.Generator().manual_seed(6))


def in_batches(data):
    order = RandomSampler(data, generator=torch.Generator().manual_seed(7))
    return DataLoader(data, batch_sampler=BatchSampler(order, 16, drop_last=False))


LOADERS = {
    "plain": lambda data: DataLoader(data, 16),
    "shuffled": lambda data: DataLoader(data, 16, shuffle=True),
    "own generator": own_generator,
    "batch sampler": in_batches,
    "own sampler": lambda data: DataLoader(data, 16, sampler=Own(len(data))),
    "persistent workers": lambda data: DataLoader(data, 16, num_workers=1, persistent_workers=True, shuffle=True),
    "own loader": lambda data: Drawing(),
    "collated": lambda data: DataLoader(dataset(48, 1), 16, collate_fn=Drawing()),
    "concatenated": lambda data: DataLoader(ConcatDataset([Noisy(24, 1), data]), 16),
    "stacked": lambda data: DataLoader(StackDataset(data), 16, collate_fn=lambda x: default_collate([each for (each,) in x])),
    "own batch sampler": lambda data: DataLoader(data, batch_sampler=Batches(len(data))),
    "transformed": lambda data: DataLoader(FakeData(48, (3, 8, 8), 4, transform=Compose([Drawing()])), 16),
    "subset": lambda data: DataLoader(Subset(data, range(40)), 16),
}


def fitted(case, callbacks, trainer):
    seed_everything(7, verbose=False)
    weights, validation = Weights(), LOADERS[case](Noisy(48, 1))
    training = DataLoader(dataset(64), 16, shuffle=True, generator=getattr(validation, "generator", None))
    module = OneNetwork()
    trainer(weights, *callbacks, max_epochs=4, num_sanity_val_steps=0).fit(module, training, validation)
    return weights.seen


@pytest.mark.parametrize("case", LOADERS)
@pytest.mark.filterwarnings("ignore:Your `val_dataloader`'s sampler has shuffling enabled")
@pytest.mark.filterwarnings("ignore:.*does not have many workers")
def test_until_the_first_cut_a_run_is_the_one_without_pruning(case, pruning, trainer):
    plain = fitted(case, [], trainer)
    callback = pruning(schedule=Schedule(start=2, steps=1))
    pruned = fitted(case, [callback], trainer)
    assert [event["epoch"] for event in callback.events] == [3]
    assert [torch.equal(a, b) for a, b in zip(plain, pruned, strict=False)][:6] == [True] * 6


@pytest.mark.parametrize("case", LOADERS)
def test_what_is_drawn_meanwhile_is_drawn_again(case):
    real = LOADERS[case](Noisy(48, 1))
    torch.manual_seed(0)
    expected = next(iter(LOADERS[case](Noisy(48, 1))))
    with spared([real, [1, 2]]) as (twin, other):
        torch.manual_seed(0)
        assert torch.equal(next(iter(twin))[0], expected[0])
        assert list(other) == [1, 2]
    torch.manual_seed(0)
    assert torch.equal(next(iter(real))[0], expected[0])
