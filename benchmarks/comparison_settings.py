"""What the comparison of sparsity while training compares: networks, data, recipes, methods and their strengths."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from math import floor
from typing import Any

import torch
from images import decode, files, sample
from lightning import Callback, LightningModule, Trainer
from torch import Tensor, nn

from actprune import Budget, Schedule, Selection, criteria
from actprune.data.digits import Digits
from actprune.data.split import stratified_split
from actprune.models.lenet import LeNet5
from actprune.models.mlp import MLP
from actprune.models.resnet import CifarResNet
from actprune.models.small_cnn import SmallCNN
from actprune.sparsity import ProxAdamW, ProxSGD
from actprune.training import PruningCallback, SeReNe

Data = dict[str, tuple[Tensor, Tensor]]  # train, val, test -> (N, C, H, W) images, (N,) classes
LEAST = Budget(params=0.02)
"""Limit where the strength does not say how much is left."""
NEARLY_ALL = Selection(max_ratio=0.99)


@dataclass(frozen=True)
class Setting:
    """What all methods of a comparison have in common, and their strengths."""

    network: Callable[[argparse.Namespace], nn.Module]
    data: Callable[[argparse.Namespace], Data]
    optimizer: Callable[..., torch.optim.Optimizer]
    proximal: Callable[..., torch.optim.Optimizer]
    epochs: int
    batch: int
    augment: dict[str, Any]
    serene: dict[str, Any]
    interval: int
    """Epochs from one pruning stage of SeReNe to the next."""
    strengths: dict[str, tuple[float, ...]]
    until: float = 1.0
    """Share of the epochs in which units leave by penalty or SeReNe, and penalties act; then recovery, as with statistics."""


# --- data ---


def digits(args: argparse.Namespace, size: int = 8) -> Data:
    module, found = Digits(augment=False, image_size=size), {}
    for name in ("train", "val", "test"):
        scans = list(getattr(module, f"{name}_dataloader")().dataset)
        found[name] = torch.stack([x for x, _ in scans]), torch.tensor([y for _, y in scans])
    return found


def cifar(args: argparse.Namespace) -> Data:
    entries = sample(files(args.data / "train"), args.images, 0)
    train, val = stratified_split([label for _, label in entries], 0.1, 0)
    parts = {name: [entries[i] for i in rows] for name, rows in (("train", train), ("val", val))}
    parts["test"] = sample(files(args.data / "test"), args.images, 0)
    return {name: decode(part) for name, part in parts.items()}


LENET = {
    "data": partial(digits, size=28),
    "optimizer": partial(torch.optim.SGD, lr=0.1),
    "proximal": partial(ProxSGD, lr=0.1),
    "epochs": 100,
    "batch": 64,
    "augment": {"shift": 0, "flip": False},
    "serene": {"decay": 1e-4, "sensitivity": "full"},
    "interval": 10,
    "strengths": {
        "none": (1.0,),
        "random": (0.1,),
        "entropy": (0.1,),
        "rademacher": (0.1,),
        "prox": (1e-3,),
        "serene": (0.1, 0.3, 1.0),
    },
}
"""scikit-learn's digits, upscaled to 28 x 28, where the SeReNe paper has MNIST; its optimizer, rate and decay."""

SETTINGS = {
    "digits": Setting(
        network=lambda args: SmallCNN(10, 1, widths=(32, 64), blocks=1),
        data=digits,
        optimizer=partial(torch.optim.AdamW, lr=2e-3, weight_decay=0.01),
        proximal=partial(ProxAdamW, lr=2e-3, weight_decay=0.01, exact_threshold=True),
        epochs=25,
        batch=64,
        augment={"shift": 1, "flip": False, "fill": -Digits.native_mean[0] / Digits.native_std[0]},
        serene={"decay": 1e-3, "sensitivity": "full"},
        interval=1,
        strengths={
            "none": (1.0,),
            "random": (0.35, 0.15),
            "entropy": (0.35, 0.15),
            "rademacher": (0.35, 0.15),
            "prox": (1e-3, 2e-3, 3e-3, 4e-3),
            "serene": (0.2, 0.5, 1.0),
        },
    ),
    "lenet300": Setting(network=lambda args: MLP(10, 1, 28, hidden=(300, 100)), **LENET),
    "lenet5": Setting(network=lambda args: LeNet5(10, 1, 28), **LENET),
    "resnet20": Setting(
        network=lambda args: CifarResNet(20, weights=str(args.weights)),
        data=cifar,
        optimizer=partial(torch.optim.SGD, lr=0.02, momentum=0.9, weight_decay=5e-4, nesterov=True),
        proximal=partial(ProxSGD, lr=0.02, momentum=0.9, weight_decay=5e-4, nesterov=True),
        epochs=10,
        batch=64,
        augment={"shift": 4, "flip": True, "fill": 0.0},
        serene={"decay": 1e-4, "sensitivity": "lower_bound"},
        interval=1,
        strengths={
            "none": (1.0,),
            "random": (0.5, 0.3),
            "entropy": (0.5, 0.3),
            "rademacher": (0.5, 0.3),
            "prox": (1.2e-3, 2e-3),
            "mcp": (0.0187, 0.0195),
            "serene": (0.9, 2.0),
        },
        until=0.6,
    ),
}


# --- methods ---


def ranked(criterion: Callable[[], Any], setting: Setting, keep: float, epochs: int) -> tuple[Any, Callback]:
    return setting.optimizer, PruningCallback(criterion(), Budget(params=keep), monitor="val/accuracy")


class Ending(PruningCallback):
    """Takes out what became zero; after its last step there is no penalty either."""

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_epoch_start(trainer, pl_module)
        if trainer.current_epoch > self.schedule.epochs(trainer.max_epochs)[-1]:
            for group in trainer.optimizers[0].param_groups:
                group["lam"] = 0.0


def prox(penalty: dict[str, Any], setting: Setting, lam: float, epochs: int) -> tuple[Any, Callback]:
    optimizer = partial(setting.proximal, **penalty, lam=lam)
    schedule = stages(epochs, min(1, epochs - 2), until=setting.until)
    callback = PruningCallback if setting.until == 1 else Ending
    return optimizer, callback(criteria.ZeroUnits(), LEAST, schedule, NEARLY_ALL, monitor="val/accuracy")


def serene(setting: Setting, tolerance: float, epochs: int) -> tuple[Any, Callback]:
    schedule = stages(epochs, min(epochs // 5, epochs - 2), setting.interval, setting.until)
    how = {"tolerance": tolerance, "schedule": schedule, "selection": NEARLY_ALL, "monitor": "val/accuracy"}
    return setting.optimizer, SeReNe(LEAST, **setting.serene, **how)


def stages(epochs: int, start: int, interval: int = 1, until: float = 1.0) -> Schedule:
    """Units may leave after every ``interval`` epochs from ``start`` on, in that share of the epochs and not after the last."""
    end = min(epochs - 1, floor(until * epochs))
    return Schedule(start=start, interval=interval, steps=max(1, (end - start) // interval))


METHODS: dict[str, Callable[[Setting, float, int], tuple[Any, Callback | None]]] = {
    "none": lambda setting, strength, epochs: (setting.optimizer, None),
    "random": partial(ranked, criteria.Random),
    "entropy": partial(ranked, criteria.Entropy),
    "rademacher": partial(ranked, criteria.Rademacher),
    "prox": partial(prox, {"penalty": "group_lasso"}),
    "mcp": partial(prox, {"penalty": "group_mcp", "gamma": 5.0}),  # above lr / (1 - momentum)
    "serene": serene,
}
