"""The base of every dataset here: images in, a fixed split, transforms per split, loaders out.

A subclass states the facts of its dataset as class attributes and says in ``load`` where the images of the three
splits come from; everything else is the same for all. Size and number of channels may be chosen, so that every dataset
goes with every model: ``in_channels=3, image_size=224`` sends grey digits through an ImageNet model.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from lightning import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader

from actprune.core.errors import ConfigError
from actprune.data.split import LabelledImages, Split
from actprune.data.transforms import image_transform

Part = tuple[LabelledImages, np.ndarray]
"""A dataset and the positions in it that make up one split."""


class ImageDataModule(LightningDataModule):
    """Image classification data with a fixed train/validation/test split.

    Args:
        batch_size: images per batch, at least 1.
        num_workers: loader processes; 0 loads in the main process.
        split_seed: chooses which images are held out; has nothing to do with the run's seed.
        val_fraction: share of the training images held out for validation where the dataset has no such split, in
            (0, 1).
        augment: random shift (and flip, where the label allows it) of training images.
        num_classes: must be the dataset's own number; stated in a config so that a model's config can refer to it.
        in_channels: 1 (grey) or 3; the dataset's own number if None.
        image_size: height and width, pixels; the dataset's own size if None.
        mean: per channel, of pixels in [0, 1]; the dataset's own if None. Pretrained weights bring theirs.
        std: per channel, of pixels in [0, 1]; the dataset's own if None.

    Raises:
        ConfigError: a value is outside what it may be.
    """

    classes: ClassVar[int]
    """Number of classes."""
    native_channels: ClassVar[int]
    """Channels of the images as stored."""
    native_size: ClassVar[int | None]
    """Height and width of the images as stored, pixels; None where every image may have its own."""
    native_mean: ClassVar[tuple[float, ...]]
    """Mean of the training pixels in [0, 1], per stored channel."""
    native_std: ClassVar[tuple[float, ...]]
    """Standard deviation of the training pixels in [0, 1], per stored channel."""
    flip: ClassVar[bool] = False
    """Whether a mirrored image keeps its label."""

    def __init__(
        self,
        *,
        batch_size: int = 64,
        num_workers: int = 0,
        split_seed: int = 0,
        val_fraction: float = 0.1,
        augment: bool = True,
        num_classes: int | None = None,
        in_channels: int | None = None,
        image_size: int | None = None,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
    ) -> None:
        super().__init__()
        self.batch_size = _whole("batch_size", batch_size, minimum=1)
        self.num_workers = _whole("num_workers", num_workers, minimum=0)
        self.split_seed = _whole("split_seed", split_seed, minimum=0)
        self.val_fraction = share("val_fraction", val_fraction)
        self.augment = augment
        self.num_classes = self._classes(num_classes)
        channels = _whole("in_channels", self.native_channels if in_channels is None else in_channels, minimum=1)
        if channels not in (1, 3):
            raise ConfigError(f"in_channels={channels} must be 1 (grey) or 3 (colour)")
        size = _whole("image_size", self.native_size if image_size is None else image_size, minimum=1)
        self.input_shape = (channels, size, size)
        self.mean = self._per_channel("mean", self.native_mean if mean is None else mean, mean is None)
        self.std = self._per_channel("std", self.native_std if std is None else std, std is None)
        if min(self.std) <= 0:
            raise ConfigError(f"std={self.std} must be positive in every channel")
        self._splits: dict[str, Split] = {}

    @abstractmethod
    def load(self) -> tuple[Part, Part, Part]:
        """Return the images and positions of train, validation and test.

        Raises:
            DataError: images are missing or unreadable.
        """

    def setup(self, stage: str | None = None) -> None:
        """Read the dataset and split it, once for all stages, so that missing test data is known before training.

        Raises:
            DataError: images are missing or unreadable; the message says which and where they belong.
        """
        if self._splits:
            return
        resize = self.input_shape[1] != self.native_size
        for name, (images, positions) in zip(("train", "val", "test"), self.load(), strict=True):
            transform = image_transform(
                self.input_shape[1],
                self.input_shape[0],
                self.mean,
                self.std,
                resize=resize,
                augment=self.augment and name == "train",
                flip=self.flip,
            )
            self._splits[name] = Split(images, positions, transform)

    def train_dataloader(self) -> DataLoader[tuple[Tensor, Tensor]]:
        """Batches of x (N, C, H, W) float32 and y (N,) int64, shuffled by torch's global generator."""
        # A last batch of one image has no variance, and batch norm refuses it in the middle of an epoch.
        single = len(self._split("train")) % self.batch_size == 1
        return self._loader("train", shuffle=True, drop_last=single and self.batch_size > 1)

    def val_dataloader(self) -> DataLoader[tuple[Tensor, Tensor]]:
        """Batches of x (N, C, H, W) float32 and y (N,) int64, every image once, in a fixed order."""
        return self._loader("val")

    def test_dataloader(self) -> DataLoader[tuple[Tensor, Tensor]]:
        """Batches of x (N, C, H, W) float32 and y (N,) int64, every image once, in a fixed order."""
        return self._loader("test")

    def _split(self, name: str) -> Split:
        self.setup()
        return self._splits[name]

    def _loader(self, name: str, *, shuffle: bool = False, drop_last: bool = False) -> DataLoader[Any]:
        return DataLoader(
            self._split(name),
            batch_size=self.batch_size,
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
            pin_memory=torch.cuda.is_available(),
            shuffle=shuffle,
            drop_last=drop_last,
        )

    def _classes(self, stated: int | None) -> int:
        if stated is not None and stated != self.classes:
            raise ConfigError(
                f"num_classes={stated} but {type(self).__name__} has {self.classes} classes; set num_classes={self.classes}"
            )
        return self.classes

    def _per_channel(self, name: str, values: Sequence[float], native: bool) -> tuple[float, ...]:
        """One value per channel; the dataset's own are repeated or averaged when the number of channels is changed."""
        channels = self.input_shape[0]
        numbers = tuple(float(value) for value in values)
        if native and len(numbers) != channels:
            numbers = (sum(numbers) / len(numbers),) * channels
        if len(numbers) != channels:
            raise ConfigError(f"{name}={list(numbers)} has {len(numbers)} values, in_channels={channels} needs {channels}")
        return numbers


def share(name: str, value: float) -> float:
    """Check that a setting is a share strictly between 0 and 1.

    Raises:
        ConfigError: it is not.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < 1:
        raise ConfigError(f"{name}={value!r} must be a share in (0, 1), e.g. 0.1")
    return float(value)


def _whole(name: str, value: object, minimum: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
        raise ConfigError(f"{name}={value!r} must be a whole number of at least {minimum}")
    return value
