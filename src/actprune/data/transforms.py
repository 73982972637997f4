"""From a raw image to a normalised tensor (C, H, W), with torchvision's transforms v2.

Augmentation is that of He et al. (2016) for CIFAR: pad by an eighth of the side (4 pixels at 32), take a random crop,
mirror where that keeps the label. Where a size was chosen, the shorter side is resized to it and the centre taken.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torchvision.transforms import v2


def image_transform(
    size: int,
    in_channels: int,
    mean: Sequence[float],
    std: Sequence[float],
    *,
    resize: bool,
    augment: bool,
    flip: bool,
) -> v2.Transform:
    """Build the transform of one split.

    Args:
        size: height and width of the result, pixels.
        in_channels: channels of the result, 1 (grey) or 3; grey images are repeated.
        mean: per channel, of pixels scaled to [0, 1].
        std: per channel, of pixels scaled to [0, 1].
        resize: whether images may come in another size than ``size``.
        augment: whether to shift (and flip) at random: the training split only.
        flip: whether a mirrored image keeps its label.

    Returns:
        A transform from a PIL image or an image tensor (uint8 in 0..255 or float32 in [0, 1]) to float32 (C, H, W).
    """
    colour = v2.Grayscale(1) if in_channels == 1 else v2.RGB()
    steps: list[v2.Transform] = [v2.PILToTensor(), colour]
    if resize:
        steps.append(v2.Resize(size, antialias=True))
    if augment:
        steps.append(v2.RandomCrop(size, padding=max(1, size // 8)))
        if flip:
            steps.append(v2.RandomHorizontalFlip())
    elif resize:
        steps.append(v2.CenterCrop(size))
    steps += [v2.ToDtype(torch.float32, scale=True), v2.Normalize(list(mean), list(std))]
    return v2.Compose(steps)
