"""Digits: 1,797 scanned handwritten digits of 8 x 8 pixels in 17 grey levels, shipped with scikit-learn.

The test part of E. Alpaydin and C. Kaynak's "Optical Recognition of Handwritten Digits" (UCI, 1998). Needs no download:
it is the data of the default run. The dataset has no split of its own; the fixed one here is 60 / 15 / 25 %, stratified
by class.
"""

from __future__ import annotations

from typing import Any

import torch
from sklearn.datasets import load_digits
from torch import Tensor

from actprune.data.base import ImageDataModule, Part, share
from actprune.data.split import three_way_split


class DigitScans:
    """All scans in memory: ``images[i]`` is ((1, 8, 8) float32 in [0, 1], label)."""

    def __init__(self) -> None:
        bunch = load_digits()
        self.images = torch.from_numpy(bunch.images).float().unsqueeze(1) / 16
        self.targets = bunch.target

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        """Return one scan and its label."""
        return self.images[index], int(self.targets[index])


class Digits(ImageDataModule):
    """scikit-learn's digits.

    Args:
        val_fraction: share of all images held out for validation, in (0, 1).
        test_fraction: share of all images held out for the test, in (0, 1).
        common: see ``ImageDataModule``.

    Raises:
        ConfigError: a value is outside what it may be, or the two shares leave nothing to train on.
    """

    classes = 10
    native_channels = 1
    native_size = 8
    native_mean = (0.3053,)
    native_std = (0.3761,)

    def __init__(self, *, val_fraction: float = 0.15, test_fraction: float = 0.25, **common: Any) -> None:
        super().__init__(val_fraction=val_fraction, **common)
        self.test_fraction = share("test_fraction", test_fraction)
        share("val_fraction + test_fraction", self.val_fraction + self.test_fraction)

    def load(self) -> tuple[Part, Part, Part]:
        """Split the scans in three."""
        scans = DigitScans()
        train, val, test = three_way_split(scans.targets, self.val_fraction, self.test_fraction, self.split_seed)
        return (scans, train), (scans, val), (scans, test)
