"""Fashion-MNIST: 60,000 + 10,000 pictures of clothes, 28 x 28 grey, in MNIST's file format (Xiao et al., 2017)."""

from __future__ import annotations

from torchvision import datasets

from actprune.data.download import DownloadedDataModule
from actprune.data.mnist import IDX_FILES


class FashionMNIST(DownloadedDataModule):
    """torchvision's FashionMNIST; 10 % of train held out for validation."""

    dataset = datasets.FashionMNIST
    folder = "FashionMNIST/raw"
    files = IDX_FILES
    source = datasets.FashionMNIST.mirrors[0]
    unpacked = "FashionMNIST/raw/*-ubyte"
    classes = 10
    native_channels = 1
    native_size = 28
    native_mean = (0.2860,)
    native_std = (0.3530,)
    flip = True
