"""CIFAR-100: 50,000 + 10,000 photographs of a hundred kinds of thing, 32 x 32 colour (Krizhevsky, 2009)."""

from __future__ import annotations

from torchvision import datasets

from actprune.data.download import DownloadedDataModule


class CIFAR100(DownloadedDataModule):
    """torchvision's CIFAR100 with its fine labels; 5,000 of the training images held out for validation."""

    dataset = datasets.CIFAR100
    folder = ""
    files = ("cifar-100-python.tar.gz",)
    source = datasets.CIFAR100.url
    unpacked = "cifar-100-python/"
    classes = 100
    native_channels = 3
    native_size = 32
    native_mean = (0.5071, 0.4865, 0.4409)
    native_std = (0.2673, 0.2564, 0.2762)
    flip = True
