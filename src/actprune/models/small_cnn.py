"""The default network: a residual CNN for small images, wide enough for most of it to be superfluous.

One residual stage per width; every stage after the first halves the resolution. Basic blocks as in He et al. (2016),
with a 1x1 convolution on the shortcut where the shape changes.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn import functional as F

from actprune.core.errors import ConfigError
from actprune.models.checks import check_positive
from actprune.models.init import kaiming_
from actprune.models.resnet import BasicBlock
from actprune.models.weights import load_weights


class SmallCNN(nn.Module):
    """Convolution, residual stages, global average pool, Linear.

    Args:
        num_classes: outputs.
        in_channels: channels C of the images.
        widths: channels of every stage, at least one.
        blocks: residual blocks per stage.
        weights: file to load, see ``load_weights``.

    Raises:
        ConfigError: a value is outside what it may be, or the weights do not fit.
    """

    def __init__(
        self,
        num_classes: int,
        in_channels: int = 1,
        widths: Sequence[int] = (32, 64),
        blocks: int = 1,
        weights: str | None = None,
    ) -> None:
        super().__init__()
        check_positive(num_classes=num_classes, in_channels=in_channels, blocks=blocks)
        if not widths:
            raise ConfigError("widths=[] must name at least one stage, e.g. widths=[32,64]")
        check_positive(**{f"widths[{i}]": width for i, width in enumerate(widths)})
        self.conv = nn.Conv2d(in_channels, widths[0], 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(widths[0])
        stages = []
        width = widths[0]
        for index, next_width in enumerate(widths):
            stage = []
            for block in range(blocks):
                stage.append(BasicBlock(width, next_width, stride=2 if index > 0 and block == 0 else 1, shortcut="B"))
                width = next_width
            stages.append(nn.Sequential(*stage))
        self.stages = nn.Sequential(*stages)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.linear = nn.Linear(width, num_classes)
        kaiming_(self)
        if weights is not None:
            load_weights(self, weights)

    def forward(self, x: Tensor) -> Tensor:
        """Map images x (N, C, H, W) to logits (N, num_classes)."""
        x = F.relu(self.bn(self.conv(x)))
        x = self.pool(self.stages(x))
        return self.linear(x.flatten(1))
