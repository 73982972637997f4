"""Where test data outside the repository lies; tests that need it are skipped with a reason where it is absent."""

import tarfile
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
CONF = ROOT / "conf"
SHARED = Path(__file__).parents[2] / "shared"
PUBLIC_WEIGHTS = SHARED / "data" / "resnet-cifar10"
CIFAR10_JPEG = SHARED / "data" / "cifar10-jpeg.tar.gz"

needs_onnx = pytest.mark.skipif(torch.__version__ < (2, 7), reason="export to onnx needs PyTorch 2.7")
needs_public_weights = pytest.mark.skipif(not PUBLIC_WEIGHTS.is_dir(), reason="published CIFAR weights are not here")
needs_cifar10_jpeg = pytest.mark.skipif(not CIFAR10_JPEG.is_file(), reason="CIFAR-10 (JPEG copy) is not here")


def unpack_cifar10_jpeg(folder: Path, train: int, test: int) -> Path:
    """Unpack the first ``train`` and ``test`` images of every class (5,000 and 1,000 are all) and return ``folder``."""
    limit = {"train": train, "test": test}
    with tarfile.open(CIFAR10_JPEG, "r:gz") as archive:
        for member in archive:
            parts = Path(member.name).parts
            if member.isfile() and int(Path(parts[-1]).stem) < limit[parts[0]]:
                target = folder / member.name
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(archive.extractfile(member).read())
    return folder
