"""CIFAR's residual networks: He et al. (2016), "Deep residual learning for image recognition", section 4.2.

Depth 6n + 2: a 3x3 convolution, three stages of n basic blocks with 16, 32 and 64 channels, global average pool,
Linear. Where the shape changes the shortcut is the paper's option A (every second pixel, zero channels around; no
parameters) or option B (1x1 convolution and batch norm). Names follow github.com/akamaster/pytorch_resnet_cifar10,
whose published weights (option A) load as they are.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from actprune.core.errors import ConfigError
from actprune.models.checks import check_choice, check_positive
from actprune.models.init import kaiming_
from actprune.models.weights import load_weights

WIDTHS = (16, 32, 64)


class PadShortcut(nn.Module):
    """Option A: every second pixel, and zero channels before and after so that the widths agree.

    Args:
        in_channels: channels of x.
        out_channels: channels of the result, at least ``in_channels``.
    """

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        before = (out_channels - in_channels) // 2
        self.pad = (0, 0, 0, 0, before, out_channels - in_channels - before)

    def forward(self, x: Tensor) -> Tensor:
        """Map x (N, in_channels, H, W) to (N, out_channels, H / 2, W / 2)."""
        return F.pad(x[:, :, ::2, ::2], self.pad)


class BasicBlock(nn.Module):
    """relu(bn(conv(relu(bn(conv(x))))) + shortcut(x)).

    Args:
        in_channels: channels of x.
        out_channels: channels of the result.
        stride: stride of the first convolution.
        shortcut: ``"A"`` or ``"B"``, used where the shape changes.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int, shortcut: str) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 and shortcut == "A":
            self.shortcut = PadShortcut(in_channels, out_channels)
        elif stride != 1 or in_channels != out_channels:
            projection = nn.Conv2d(in_channels, out_channels, 1, stride, bias=False)
            self.shortcut = nn.Sequential(projection, nn.BatchNorm2d(out_channels))

    def forward(self, x: Tensor) -> Tensor:
        """Map x (N, in_channels, H, W) to (N, out_channels, H / stride, W / stride)."""
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        return F.relu(out + self.shortcut(x))


class CifarResNet(nn.Module):
    """ResNet-20, 32, 44, 56, 110, ... for small images.

    Args:
        depth: number of weighted layers, 6n + 2.
        num_classes: outputs.
        in_channels: channels C of the images.
        shortcut: ``"A"`` (zero padding) or ``"B"`` (projection).
        weights: file to load, see ``load_weights``.

    Raises:
        ConfigError: a value is outside what it may be, or the weights do not fit.
    """

    def __init__(
        self,
        depth: int = 20,
        num_classes: int = 10,
        in_channels: int = 3,
        shortcut: str = "A",
        weights: str | None = None,
    ) -> None:
        super().__init__()
        check_positive(depth=depth, num_classes=num_classes, in_channels=in_channels)
        check_choice("shortcut", shortcut, ("A", "B"))
        if depth < 8 or depth % 6 != 2:
            raise ConfigError(f"depth={depth} must be 6n + 2 with n of at least 1, e.g. 20, 32, 44, 56, 110")
        self.conv1 = nn.Conv2d(in_channels, WIDTHS[0], 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(WIDTHS[0])
        blocks = (depth - 2) // 6
        self.layer1 = _stage(WIDTHS[0], WIDTHS[0], blocks, 1, shortcut)
        self.layer2 = _stage(WIDTHS[0], WIDTHS[1], blocks, 2, shortcut)
        self.layer3 = _stage(WIDTHS[1], WIDTHS[2], blocks, 2, shortcut)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.linear = nn.Linear(WIDTHS[2], num_classes)
        kaiming_(self)
        if weights is not None:
            load_weights(self, weights)

    def forward(self, x: Tensor) -> Tensor:
        """Map images x (N, C, H, W) to logits (N, num_classes)."""
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.linear(self.pool(x).flatten(1))


def _stage(in_channels: int, out_channels: int, blocks: int, stride: int, shortcut: str) -> nn.Sequential:
    first = BasicBlock(in_channels, out_channels, stride, shortcut)
    rest = [BasicBlock(out_channels, out_channels, 1, shortcut) for _ in range(blocks - 1)]
    return nn.Sequential(first, *rest)
