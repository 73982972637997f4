"""A multilayer perceptron on flattened images: Linear, ReLU, ..., Linear."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from actprune.core.errors import ConfigError
from actprune.models.checks import check_positive
from actprune.models.weights import load_weights


class MLP(nn.Sequential):
    """Linear and ReLU by turns; the last Linear classifies.

    Args:
        num_classes: outputs.
        in_channels: channels C of the images.
        image_size: height and width of the images, pixels.
        hidden: width of every hidden layer, at least one.
        weights: file to load, see ``load_weights``.

    Raises:
        ConfigError: a value is outside what it may be, or the weights do not fit.
    """

    def __init__(
        self,
        num_classes: int,
        in_channels: int = 1,
        image_size: int = 8,
        hidden: Sequence[int] = (256, 128),
        weights: str | None = None,
    ) -> None:
        check_positive(num_classes=num_classes, in_channels=in_channels, image_size=image_size)
        if not hidden:
            raise ConfigError("hidden=[] must name at least one width, e.g. hidden=[256,128]")
        check_positive(**{f"hidden[{i}]": width for i, width in enumerate(hidden)})
        layers: list[nn.Module] = [nn.Flatten()]
        width = in_channels * image_size**2
        for next_width in hidden:
            layers += [nn.Linear(width, next_width), nn.ReLU()]
            width = next_width
        super().__init__(*layers, nn.Linear(width, num_classes))
        if weights is not None:
            load_weights(self, weights)

    def forward(self, x: Tensor) -> Tensor:
        """Map images x (N, C, H, W) to logits (N, num_classes)."""
        return super().forward(x)
