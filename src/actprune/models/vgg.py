"""VGG-16 with batch norm for small images: Simonyan & Zisserman (2015), configuration D.

Thirteen convolutions, each with batch norm and ReLU, and five max pools. As usual for CIFAR, one Linear takes the place
of the three of the ImageNet model, whose first two would hold most of the parameters.
"""

from __future__ import annotations

from torch import Tensor, nn

from actprune.core.errors import ConfigError
from actprune.models.checks import check_positive
from actprune.models.init import kaiming_
from actprune.models.weights import load_weights

STAGES = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))
"""Channels of the convolutions; a max pool halves the resolution after every stage."""


class VGG16BN(nn.Module):
    """Thirteen 3x3 convolutions in five stages, global average pool (a no-op at 32 pixels), Linear.

    Args:
        num_classes: outputs.
        in_channels: channels C of the images.
        image_size: height and width of the images, pixels; at least 32, since it is halved five times.
        weights: file to load, see ``load_weights``.

    Raises:
        ConfigError: a value is outside what it may be, or the weights do not fit.
    """

    def __init__(self, num_classes: int = 10, in_channels: int = 3, image_size: int = 32, weights: str | None = None) -> None:
        super().__init__()
        check_positive(num_classes=num_classes, in_channels=in_channels, image_size=image_size)
        smallest = 2 ** len(STAGES)
        if image_size < smallest:
            raise ConfigError(
                f"image_size={image_size} must be at least {smallest} for VGG-16, which halves it {len(STAGES)} times; "
                f"set data.image_size={smallest}"
            )
        layers: list[nn.Module] = []
        width = in_channels
        for stage in STAGES:
            for next_width in stage:
                convolution = nn.Conv2d(width, next_width, 3, padding=1)
                layers += [convolution, nn.BatchNorm2d(next_width), nn.ReLU()]
                width = next_width
            layers.append(nn.MaxPool2d(2))
        self.features = nn.Sequential(*layers)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Linear(width, num_classes)
        kaiming_(self)
        if weights is not None:
            load_weights(self, weights)

    def forward(self, x: Tensor) -> Tensor:
        """Map images x (N, C, H, W) to logits (N, num_classes)."""
        x = self.pool(self.features(x))
        return self.classifier(x.flatten(1))
