"""LeNet-5 for small grey or colour images, in the form that pruning papers use.

LeCun et al. (1998); 20 and 50 filters of 5x5 and one hidden layer of 500 as in Caffe's example, with ReLU. (LeNet-300 is
``MLP`` with ``hidden=[300,100]``.)
"""

from __future__ import annotations

from torch import Tensor, nn

from actprune.core.errors import ConfigError
from actprune.models.checks import check_positive
from actprune.models.weights import load_weights

SMALLEST = 16
"""Pixels: two 5x5 convolutions without padding, each followed by a 2x2 max pool, leave one position."""


class LeNet5(nn.Module):
    """Two convolutions with max pools, two linear layers.

    Args:
        num_classes: outputs.
        in_channels: channels C of the images.
        image_size: height and width of the images, pixels, at least 16.
        weights: file to load, see ``load_weights``.

    Raises:
        ConfigError: a value is outside what it may be, or the weights do not fit.
    """

    def __init__(self, num_classes: int = 10, in_channels: int = 1, image_size: int = 28, weights: str | None = None) -> None:
        super().__init__()
        check_positive(num_classes=num_classes, in_channels=in_channels, image_size=image_size)
        if image_size < SMALLEST:
            raise ConfigError(f"image_size={image_size} must be at least {SMALLEST} for LeNet-5; set data.image_size=28")
        side = ((image_size - 4) // 2 - 4) // 2
        self.features = nn.Sequential(
            nn.Conv2d(in_channels, 20, 5), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(20, 50, 5), nn.ReLU(), nn.MaxPool2d(2)
        )
        self.hidden = nn.Linear(50 * side**2, 500)
        self.classifier = nn.Linear(500, num_classes)
        if weights is not None:
            load_weights(self, weights)

    def forward(self, x: Tensor) -> Tensor:
        """Map images x (N, C, H, W) to logits (N, num_classes)."""
        x = self.features(x).flatten(1)
        return self.classifier(self.hidden(x).relu())
