"""MNIST: 60,000 + 10,000 handwritten digits, 28 x 28 grey (LeCun et al., 1998)."""

from __future__ import annotations

from torchvision import datasets

from actprune.data.download import DownloadedDataModule

IDX_FILES = (
    "train-images-idx3-ubyte.gz",
    "train-labels-idx1-ubyte.gz",
    "t10k-images-idx3-ubyte.gz",
    "t10k-labels-idx1-ubyte.gz",
)


class MNIST(DownloadedDataModule):
    """torchvision's MNIST; 10 % of train held out for validation. A mirrored digit is another sign: no flips."""

    dataset = datasets.MNIST
    folder = "MNIST/raw"
    files = IDX_FILES
    source = datasets.MNIST.mirrors[0]
    unpacked = "MNIST/raw/*-ubyte"
    classes = 10
    native_channels = 1
    native_size = 28
    native_mean = (0.1307,)
    native_std = (0.3081,)
