"""Published weights of He et al.'s CIFAR networks classify CIFAR-10 (JPEG copy) as well as they are known to."""

import pytest
import torch

from actprune.data.imagefolder import ImageFolder
from actprune.models.resnet import CifarResNet
from paths import PUBLIC_WEIGHTS, needs_cifar10_jpeg, needs_public_weights, unpack_cifar10_jpeg

pytestmark = [needs_cifar10_jpeg, needs_public_weights]


def accuracy(depth: int, file: str, data: ImageFolder) -> tuple[float, int]:
    model = CifarResNet(depth, weights=str(PUBLIC_WEIGHTS / file)).eval()
    right = total = 0
    with torch.no_grad():
        for x, y in data.test_dataloader():
            right += (model(x).argmax(1) == y).sum().item()
            total += len(y)
    return 100 * right / total, total


def test_resnet56_on_500_images(tmp_path):
    data = ImageFolder(root=unpack_cifar10_jpeg(tmp_path, train=2, test=50), batch_size=250)
    percent, total = accuracy(56, "resnet56-4bfd9763.th", data)
    assert total == 500
    assert percent == pytest.approx(83.2, abs=4)  # 2.4 standard errors


@pytest.mark.parametrize(
    ("depth", "file"),
    [(32, "resnet32-d509ac18.th"), (44, "resnet44-014dd654.th")],
)
def test_other_depths_load(depth, file):
    CifarResNet(depth, weights=str(PUBLIC_WEIGHTS / file))


@pytest.fixture(scope="module")
def whole_test_set(tmp_path_factory):
    folder = unpack_cifar10_jpeg(tmp_path_factory.mktemp("cifar10-jpeg"), train=2, test=1000)
    return ImageFolder(root=folder, batch_size=500)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("depth", "file", "expected"),
    [
        (56, "resnet56-4bfd9763.th", 83.2),
        (20, "resnet20-12fca82f.th", 81.0),
        (20, "resnet20-jpeg.th", 87.48),
        (56, "resnet56-jpeg.th", 89.23),
    ],
)
def test_accuracy_on_the_whole_test_set(whole_test_set, depth, file, expected):
    percent, total = accuracy(depth, file, whole_test_set)
    assert total == 10_000
    assert percent == pytest.approx(expected, abs=0.06)
