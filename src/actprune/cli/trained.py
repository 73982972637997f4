"""What tasks on a trained network share: its file, samples to watch it on, how often it is right."""

from __future__ import annotations

import pickle
from contextlib import suppress
from itertools import islice
from typing import Any

import torch
from lightning import LightningDataModule
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset

from actprune.core.record import SurgeryRecord
from actprune.models.weights import load_weights
from actprune.surgery import apply_record, load_pruned
from actprune.training.resume import KEY


def load_network(net: nn.Module, path: str) -> None:
    """Load weights, a checkpoint of a run, or a pruned network, into a network of the original shape, in place.

    Raises:
        ConfigError: the file is missing, is none of these, or does not fit.
        SurgeryError: the network is not the one that was pruned.
    """
    content = read_network(path)
    if isinstance(content, dict) and "surgery_record" in content:
        load_pruned(net, path)
        return
    if isinstance(content, dict) and "net" in content.get(KEY, {}):
        apply_record(net, SurgeryRecord.from_dict(content[KEY]["net"]))
    load_weights(net, path)


def read_network(path: str) -> Any:
    """What a file holds; None where it cannot be read, which ``load_weights`` tells of."""
    with suppress(OSError, pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError):
        return torch.load(path, map_location="cpu", weights_only=True)
    return None


def ready_unaugmented(data: LightningDataModule) -> None:
    """Read the data; training images will be as they are, without random shifts and flips: nothing is trained on them."""
    if hasattr(data, "augment"):
        data.augment = False
    data.prepare_data()
    data.setup("fit")


def first_samples(loader: Any, n: int | None) -> list[Any]:
    """The first n samples of a loader, in batches of images and labels; all where n is None."""
    if n is None:
        return [(images, labels) for images, labels in loader]
    batches = [(images, labels) for images, labels in islice(loader, -(-n // loader.batch_size))]
    images, labels = batches[-1]
    left = n - sum(len(y) for _, y in batches[:-1])
    batches[-1] = (images[:left], labels[:left])
    return batches


def drawn_samples(loader: DataLoader[Any], n: int | None, seed: int) -> list[Any]:
    """As many samples of a loader that does not shuffle, drawn: where data lie in the order of their classes, any part has all.

    Returns:
        Batches of images and labels, in the order of the draw; all where n is None or more than there are.
    """
    drawn = torch.randperm(len(loader.dataset), generator=torch.Generator().manual_seed(seed), device="cpu")[:n].tolist()  # type: ignore[arg-type]
    alike = {name: getattr(loader, name) for name in ("batch_size", "num_workers", "collate_fn")}
    return first_samples(DataLoader(Subset(loader.dataset, drawn), **alike), None)


def fed(net: nn.Module, images: Tensor) -> Tensor:
    """Images as the network takes them: on the device of its weights and, unless they are whole numbers, in their precision."""
    weight = next(net.parameters())
    return images.to(weight if images.is_floating_point() else weight.device)


@torch.no_grad()
def accuracy(model: nn.Module, loader: DataLoader[Any]) -> float:
    """Share of samples that the model gets right, on the device where it is."""
    device = next(model.parameters()).device
    right = seen = 0
    for images, labels in loader:
        right += int((model(images.to(device)).argmax(1).cpu() == labels).sum())
        seen += len(labels)
    return right / seen
