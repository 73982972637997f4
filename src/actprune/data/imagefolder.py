"""Any folder of class folders, read by torchvision's ImageFolder.

Two layouts: ``root/train/CLASS/*`` with ``root/test/CLASS/*`` and, if there is one, ``root/val/CLASS/*``; or flat,
``root/CLASS/*``, which is split in three. Labels follow the alphabetical order of the class folders. Files are decoded
when they are needed, but all headers are read before training: a file that is no image is known before work is lost.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torchvision import datasets

from actprune.core.errors import ConfigError, DataError
from actprune.data.base import ImageDataModule, Part, share
from actprune.data.split import stratified_split, three_way_split


class ImageFolder(ImageDataModule):
    """Images in folders named by their class.

    Args:
        root: the folder; see the module's docstring for its layouts.
        test_fraction: share of all images held out for the test in the flat layout, in (0, 1).
        num_classes: number of class folders; counted if None, checked otherwise.
        common: see ``ImageDataModule``; ``val_fraction`` is used where there is no ``val`` folder, and is a share of
            ``train`` there, of all images in the flat layout.

    Raises:
        ConfigError: a value is outside what it may be, or ``num_classes`` is not the number of class folders.
        DataError: ``root`` is not there or has no class folders.
    """

    native_channels = 3
    native_size = None
    # ImageNet's, which pretrained weights for photographs expect.
    native_mean = (0.485, 0.456, 0.406)
    native_std = (0.229, 0.224, 0.225)
    flip = True

    def __init__(
        self,
        *,
        root: str | os.PathLike[str],
        test_fraction: float = 0.1,
        num_classes: int | None = None,
        image_size: int = 32,
        **common: Any,
    ) -> None:
        self.root = Path(root)
        super().__init__(num_classes=num_classes, image_size=image_size, **common)
        self.test_fraction = share("test_fraction", test_fraction)
        share("val_fraction + test_fraction", self.val_fraction + self.test_fraction)

    def load(self) -> tuple[Part, Part, Part]:
        """Find the images of the three splits and check that every file is an image.

        Raises:
            DataError: a folder is missing or empty, splits have different classes, or a file is no image.
        """
        if not _has_splits(self.root):
            images = _read(self.root)
            fractions = self.val_fraction, self.test_fraction
            train, val, test = three_way_split(images.targets, *fractions, self.split_seed)
            return (images, train), (images, val), (images, test)
        images, test_images = _read(self.root / "train"), _read(self.root / "test")
        _same_classes(images, test_images)
        test_part = test_images, np.arange(len(test_images))
        if not (self.root / "val").is_dir():
            train, val = stratified_split(images.targets, self.val_fraction, self.split_seed)
            return (images, train), (images, val), test_part
        val_images = _read(self.root / "val")
        _same_classes(images, val_images)
        return (images, np.arange(len(images))), (val_images, np.arange(len(val_images))), test_part

    def _classes(self, stated: int | None) -> int:
        found = count_classes(self.root)
        if stated is not None and stated != found:
            raise ConfigError(
                f"num_classes={stated} but {self.root} has {found} class folders; set num_classes={found} or leave it out"
            )
        return found


def count_classes(root: str | os.PathLike[str]) -> int:
    """Count the class folders under ``root`` (or ``root/train``), so that a model's config can refer to the number.

    Raises:
        DataError: the folder is not there or has no two class folders.
    """
    folder = Path(root)
    folder = folder / "train" if _has_splits(folder) else folder
    if not folder.is_dir():
        raise DataError(f"there is no folder {folder.resolve()}; set data.root to a folder of class folders")
    classes = _subfolders(folder)
    if not classes:
        raise DataError(f"{folder.resolve()} has no class folders; expected {folder}/CLASS/IMAGE or {folder}/train/CLASS/IMAGE")
    if len(classes) == 1:
        raise DataError(
            f"{folder.resolve()} has a single class folder, {classes[0]}; set data.root to the folder that holds a folder for "
            "each of two classes or more"
        )
    return len(classes)


class _Images(datasets.ImageFolder):
    """torchvision's ImageFolder, saying which file cannot be decoded."""

    def __getitem__(self, index: int) -> tuple[Any, int]:
        path = self.samples[index][0]
        try:
            return super().__getitem__(index)
        except (OSError, SyntaxError, ValueError) as error:
            raise DataError(f"cannot decode image {Path(path).resolve()} ({error}); replace or remove the file") from error


def _read(folder: Path) -> _Images:
    if not folder.is_dir() or not _subfolders(folder):
        raise DataError(
            f"{folder.resolve()} is missing or has no class folders; expected {folder}/CLASS/IMAGE. Without a test "
            "folder, use the flat layout root/CLASS/IMAGE, which is split in three"
        )
    try:
        images = _Images(folder)
    except FileNotFoundError as error:
        raise DataError(f"a class folder in {folder.resolve()} has no images: {error}") from error
    for path, _ in images.samples:
        _check_header(path)
    return images


def _check_header(path: str) -> None:
    try:
        with Image.open(path):
            pass
    except (OSError, SyntaxError, ValueError) as error:
        raise DataError(f"{Path(path).resolve()} is not an image ({error}); replace or remove the file") from error


def _same_classes(train: _Images, other: _Images) -> None:
    if train.classes != other.classes:
        difference = sorted(set(train.classes) ^ set(other.classes))
        raise DataError(
            f"{Path(train.root).resolve()} and {Path(other.root).resolve()} must have the same class folders; "
            f"only one of them has {', '.join(difference[:5])}"
        )


def _has_splits(root: Path) -> bool:
    """Whether ``root/train`` holds class folders; a flat layout may well have a class that is called train."""
    return (root / "train").is_dir() and bool(_subfolders(root / "train"))


def _subfolders(folder: Path) -> list[str]:
    return sorted(entry.name for entry in os.scandir(folder) if entry.is_dir())
