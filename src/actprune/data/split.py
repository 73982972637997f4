"""Fixed stratified splits: of every class the same share is held out, chosen by a seed and by nothing else.

The permutation comes from ``numpy.random.RandomState``, whose stream numpy guarantees never to change, so that a split
stays the same across versions and machines.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np
from torch import Tensor
from torch.utils.data import Dataset

from actprune.core.errors import DataError


class LabelledImages(Protocol):
    """What torchvision's classification datasets have in common."""

    targets: Any
    """The label of every image, a sequence of n integers."""

    def __getitem__(self, index: int) -> tuple[Any, int]:
        """Return one untransformed image and its label."""


def stratified_split(targets: Sequence[int] | Tensor, fraction: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Split positions into a rest and a hold-out that takes ``fraction`` of every class (rounded, at least one image).

    Args:
        targets: label of every image, (n,).
        fraction: share held out, in (0, 1).
        seed: chooses the split.

    Returns:
        Sorted positions of the rest and of the hold-out, int64; disjoint, together all n.

    Raises:
        DataError: a class has fewer than two images, so that it cannot be on both sides.
    """
    labels = np.asarray(targets)
    random = np.random.RandomState(seed)
    held_out = []
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        if len(members) < 2:
            raise DataError(
                f"class {label} has {len(members)} image, a stratified split needs at least 2; "
                "add images to the class or remove it"
            )
        size = min(max(1, round(fraction * len(members))), len(members) - 1)
        held_out.append(random.permutation(members)[:size])
    chosen = np.sort(np.concatenate(held_out))
    return np.setdiff1d(np.arange(len(labels)), chosen), chosen


def three_way_split(
    targets: Sequence[int] | Tensor, val_fraction: float, test_fraction: float, seed: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Split positions into train, validation and test, both fractions being shares of all images.

    The test images depend on ``test_fraction`` and ``seed`` only: another ``val_fraction`` leaves them as they are.

    Returns:
        Sorted positions of train, validation and test, int64; disjoint, together all n.

    Raises:
        DataError: a class has fewer than three images.
    """
    rest, test = stratified_split(targets, test_fraction, seed)
    labels = np.asarray(targets)[rest]
    train, val = stratified_split(labels, val_fraction / (1 - test_fraction), seed)
    return rest[train], rest[val], test


class Split(Dataset[tuple[Tensor, int]]):
    """Some images of a dataset, seen through a transform of their own."""

    def __init__(
        self,
        images: LabelledImages,
        positions: np.ndarray,  # (n,) int64 positions in images
        transform: Callable[[Any], Tensor],
    ) -> None:
        self.images = images
        self.positions = positions
        self.transform = transform
        self.targets = np.asarray(images.targets)[positions]

    def __len__(self) -> int:
        """Number of images in this split."""
        return len(self.positions)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        """Return one transformed image (C, H, W), float32, and its label."""
        image, label = self.images[int(self.positions[index])]
        return self.transform(image), int(label)
