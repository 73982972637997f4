"""MLP, small CNN, VGG."""

import pytest
import torch
from torch.nn import functional as F

from actprune.core.errors import ConfigError
from actprune.data.digits import Digits
from actprune.models.lenet import LeNet5
from actprune.models.mlp import MLP
from actprune.models.small_cnn import SmallCNN
from actprune.models.vgg import VGG16BN


def test_mlp_is_matrices_and_relu():
    model = MLP(num_classes=3, in_channels=2, image_size=4, hidden=(7, 5)).double()
    x = torch.randn(6, 2, 4, 4, dtype=torch.float64)
    w = dict(model.named_parameters())
    h = x.reshape(6, 32)
    for layer in ("1", "3"):
        h = (h @ w[f"{layer}.weight"].T + w[f"{layer}.bias"]).clamp(min=0)
    torch.testing.assert_close(model(x), h @ w["5.weight"].T + w["5.bias"])


@pytest.mark.parametrize(
    ("hidden", "match"),
    [([], r"hidden=\[\] must name at least one"), ([8, 0], r"hidden\[1\]=0 must be a whole number")],
)
def test_mlp_refuses_bad_widths(hidden, match):
    with pytest.raises(ConfigError, match=match):
        MLP(num_classes=10, hidden=hidden)


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"widths": []}, r"widths=\[\] must name at least one"),
        ({"widths": [8, -1]}, r"widths\[1\]=-1 must be a whole number"),
        ({"blocks": 0}, "blocks=0 must be a whole number"),
    ],
)
def test_small_cnn_refuses_bad_sizes(settings, match):
    with pytest.raises(ConfigError, match=match):
        SmallCNN(num_classes=10, **settings)


def test_small_cnn_halves_the_resolution_in_every_stage_after_the_first():
    model = SmallCNN(num_classes=10, widths=(4, 6, 8), blocks=2)
    sizes = []
    for stage in model.stages:
        stage.register_forward_hook(lambda module, args, out: sizes.append(tuple(out.shape[1:])))
    model(torch.randn(2, 1, 8, 8))
    assert sizes == [(4, 8, 8), (6, 4, 4), (8, 2, 2)]
    assert [len(stage) for stage in model.stages] == [2, 2, 2]


def test_small_cnn_learns_digits_in_a_few_epochs():
    data = Digits(batch_size=64, augment=False)
    model = SmallCNN(num_classes=10)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(3):
        for x, y in data.train_dataloader():
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
    model.eval()
    with torch.no_grad():
        right = sum((model(x).argmax(1) == y).sum().item() for x, y in data.test_dataloader())
    assert right / len(data.test_dataloader().dataset) > 0.93


def test_vgg_has_thirteen_convolutions_and_five_pools():
    kinds = [type(module).__name__ for module in VGG16BN().features]
    assert kinds.count("Conv2d") == kinds.count("BatchNorm2d") == kinds.count("ReLU") == 13
    assert kinds.count("MaxPool2d") == 5
    assert VGG16BN(image_size=64)(torch.randn(2, 3, 64, 64)).shape == (2, 10)


def test_vgg_refuses_small_images():
    with pytest.raises(ConfigError, match="image_size=28 must be at least 32 .*set data.image_size=32"):
        VGG16BN(image_size=28)


def test_lenet5_is_its_layers():
    torch.manual_seed(0)
    model, x = LeNet5(num_classes=3, in_channels=2, image_size=20).double(), torch.randn(4, 2, 20, 20).double()
    w = dict(model.named_parameters())
    h = F.max_pool2d(F.conv2d(x, w["features.0.weight"], w["features.0.bias"]).clamp(min=0), 2)
    h = F.max_pool2d(F.conv2d(h, w["features.3.weight"], w["features.3.bias"]).clamp(min=0), 2).reshape(4, -1)
    h = (h @ w["hidden.weight"].T + w["hidden.bias"]).clamp(min=0)
    torch.testing.assert_close(model(x), h @ w["classifier.weight"].T + w["classifier.bias"])
    with pytest.raises(ConfigError, match="image_size=8 must be at least 16 for LeNet-5; set data.image_size=28"):
        LeNet5(image_size=8)
