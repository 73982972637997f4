"""Base of the datasets that torchvision downloads: its classes, its files, and a clear word when neither is there."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from actprune.core.errors import DataError
from actprune.data.base import ImageDataModule, Part
from actprune.data.split import LabelledImages, stratified_split


class DownloadedDataModule(ImageDataModule):
    """A torchvision dataset with a train and a test half; validation is a fixed stratified share of train.

    Args:
        root: folder of all datasets; torchvision puts each into a folder of its own below.
        download: fetch what is missing. Files that are there are used as they are, with or without a network.
        common: see ``ImageDataModule``.

    Raises:
        ConfigError: a value is outside what it may be.
    """

    dataset: ClassVar[Any]
    """torchvision's class, called as ``dataset(root, train=..., download=...)``."""
    folder: ClassVar[str]
    """Folder below ``root`` that takes the files, "" for ``root`` itself."""
    files: ClassVar[tuple[str, ...]]
    """Names of the published files, as torchvision expects them; it unpacks them itself when ``download`` is set."""
    source: ClassVar[str]
    """Where the files are published."""
    unpacked: ClassVar[str]
    """What torchvision reads after unpacking, below ``root``."""

    def __init__(self, *, root: str | os.PathLike[str] = "data", download: bool = True, **common: Any) -> None:
        super().__init__(**common)
        self.root = Path(root)
        self.download = download

    def prepare_data(self) -> None:
        """Fetch and unpack what is missing (Lightning calls this on one rank only, without state).

        Raises:
            DataError: a file is neither there nor can be fetched.
        """
        if self.download:
            self._half(train=True, download=True)
            self._half(train=False, download=True)

    def load(self) -> tuple[Part, Part, Part]:
        """Read both halves and split the training half.

        Raises:
            DataError: a file is missing or damaged.
        """
        train, test = self._half(train=True, download=False), self._half(train=False, download=False)
        fit, val = stratified_split(train.targets, self.val_fraction, self.split_seed)
        return (train, fit), (train, val), (test, np.arange(len(test.targets)))

    def _half(self, *, train: bool, download: bool) -> LabelledImages:
        try:
            return self.dataset(self.root, train=train, download=download)
        except (OSError, RuntimeError, ValueError, EOFError) as error:
            name, place = self.dataset.__name__, (self.root / self.folder).resolve()
            raise DataError(
                f"{name} is not complete under {self.root.resolve()} and was not fetched (download={self.download}: "
                f"{_one_line(error)}); set download=true on a machine with a network, or put {', '.join(self.files)} "
                f"from {self.source} into {place} and keep download=true (unpacks them, fetches nothing), "
                f"or copy the unpacked {self.unpacked} into {self.root.resolve()}"
            ) from error


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
