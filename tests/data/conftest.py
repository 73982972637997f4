"""Small files in the real formats of the datasets that are not shipped with a package."""

import pickle
import struct
from pathlib import Path
from zlib import crc32

import numpy as np
import pytest
from PIL import Image
from torchvision import datasets

TRAIN, TEST = 40, 12
"""Images per class in the two halves."""


def pixels(n: int, shape: tuple[int, ...], seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (n, *shape), dtype=np.uint8)


def write_idx(folder: Path) -> None:
    """MNIST's format: big-endian magic and sizes, then bytes."""
    folder.mkdir(parents=True)
    for seed, (half, n) in enumerate((("train", TRAIN), ("t10k", TEST))):
        labels = np.arange(10 * n, dtype=np.uint8) % 10
        images = pixels(len(labels), (28, 28), seed)
        (folder / f"{half}-images-idx3-ubyte").write_bytes(struct.pack(">4i", 2051, *images.shape) + images.tobytes())
        (folder / f"{half}-labels-idx1-ubyte").write_bytes(struct.pack(">2i", 2049, len(labels)) + labels.tobytes())


def write_cifar(folder: Path, dataset: type, key: str, classes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """CIFAR's format: pickled dicts; torchvision's checksums, which are those of the real files, are left out."""
    folder.mkdir(parents=True)
    for seed, half in enumerate(("train_list", "test_list")):
        files = [name for name, _ in getattr(dataset, half)]
        n = (20 if half == "train_list" else TEST) * classes // len(files)
        for part, name in enumerate(files):
            data = pixels(n, (3072,), 10 * seed + part)
            content = {"data": data, key: [i % classes for i in range(n)]}
            (folder / name).write_bytes(pickle.dumps(content))
        monkeypatch.setattr(dataset, half, [[name, None] for name in files])
    meta = {dataset.meta["key"]: [str(c) for c in range(classes)]}
    (folder / dataset.meta["filename"]).write_bytes(pickle.dumps(meta))
    monkeypatch.setitem(dataset.meta, "md5", None)


def write_folders(root: Path, counts: dict[str, int], size: tuple[int, int] = (32, 32), suffix: str = "png") -> Path:
    """Different noise in every file; ``counts`` says how many files there are in each folder."""
    for name, count in counts.items():
        (root / name).mkdir(parents=True)
        for index in range(count):
            noise = pixels(1, (size[1], size[0], 3), crc32(f"{root.name}/{name}/{index}".encode()))[0]
            Image.fromarray(noise).save(root / name / f"{index:03d}.{suffix}")
    return root


@pytest.fixture
def folders():
    return write_folders


@pytest.fixture
def write_files(monkeypatch):
    """A function (config's name, folder) that writes the files which that dataset reads."""

    def write(name: str, root: Path) -> None:
        if name == "mnist":
            write_idx(root / "MNIST" / "raw")
        elif name == "fashion_mnist":
            write_idx(root / "FashionMNIST" / "raw")
        elif name == "cifar10":
            write_cifar(root / "cifar-10-batches-py", datasets.CIFAR10, "labels", 10, monkeypatch)
        elif name == "cifar100":
            write_cifar(root / "cifar-100-python", datasets.CIFAR100, "fine_labels", 100, monkeypatch)
        elif name == "imagefolder":
            write_folders(root / "train", {"ant": 40, "bee": 30, "cat": 20})
            write_folders(root / "test", {"ant": 5, "bee": 5, "cat": 5})

    return write
