"""CIFAR-10: 50,000 + 10,000 photographs of ten kinds of thing, 32 x 32 colour (Krizhevsky, 2009)."""

from __future__ import annotations

from torchvision import datasets

from actprune.data.download import DownloadedDataModule


class CIFAR10(DownloadedDataModule):
    """torchvision's CIFAR10; 5,000 of the training images held out for validation."""

    dataset = datasets.CIFAR10
    folder = ""
    files = ("cifar-10-python.tar.gz",)
    source = datasets.CIFAR10.url
    unpacked = "cifar-10-batches-py/"
    classes = 10
    native_channels = 3
    native_size = 32
    native_mean = (0.4914, 0.4822, 0.4465)
    native_std = (0.2470, 0.2435, 0.2616)
    flip = True
