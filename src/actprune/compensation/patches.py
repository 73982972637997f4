"""What a layer reads together: a convolution's patch of C channels times kernel taps, a linear layer's C inputs.

A convolution is the matrix product of its weight, flattened to (out, C * taps), with the patch at every output position.
Stride, dilation and every padding mode are the layer's own; zeros of the padding count as what they are.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Conv = nn.modules.conv._ConvNd
Transposed = nn.modules.conv._ConvTransposeNd


def reads_patches(module: nn.Module, weight: Tensor) -> bool:
    """Whether the layer is an ordinary convolution with this weight: neither transposed nor grouped."""
    own = isinstance(module, Conv) and not isinstance(module, Transposed) and module.weight is weight
    return own and module.groups == 1  # type: ignore[return-value]


def pads_zeros(module: nn.Module, weight: Tensor) -> bool:
    """Whether the layer is an ordinary convolution whose taps may meet zeros of a padding."""
    return reads_patches(module, weight) and module.padding_mode == "zeros" and any(module._reversed_padding_repeated_twice)  # type: ignore[arg-type, union-attr]


def taps_seen(module: nn.Module, space: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Which taps meet the map, not its padding: patterns (M, taps) and the share of output positions of each (M,), float64."""
    assert isinstance(module, Conv)
    seen = windows(torch.ones(1, 1, *space, dtype=torch.uint8), module)[0, 0].flatten(len(space)).flatten(0, -2)
    patterns, counts = torch.unique(seen, dim=0, return_counts=True)
    return patterns.double(), counts.double() / len(seen)


def windows(
    x: Tensor,  # (N, C, *space)
    conv: Conv,
) -> Tensor:
    """Every patch of a convolution, a view of the padded input: (N, C, *output positions, *taps)."""
    pads = conv._reversed_padding_repeated_twice
    if any(pads):
        mode = "constant" if conv.padding_mode == "zeros" else conv.padding_mode
        x = F.pad(x, pads, mode=mode)
    n_space = len(conv.kernel_size)
    for axis, (taps, stride, dilation) in enumerate(zip(conv.kernel_size, conv.stride, conv.dilation, strict=True)):
        x = x.unfold(2 + axis, dilation * (taps - 1) + 1, stride)
        if dilation > 1:
            x = x[..., ::dilation]
    assert x.dim() == 2 + 2 * n_space
    return x


def patches_at(
    x: Tensor,  # (N, C, *space)
    module: nn.Module,
    positions: Tensor,  # (N, P) flat output positions of every sample
) -> Tensor:
    """What the layer reads at the given positions: (N, P, C * taps), or (N, P, C) for a layer that is no convolution."""
    rows = torch.arange(len(x), device=x.device).unsqueeze(1)
    if not isinstance(module, Conv):
        return x.flatten(2)[rows, :, positions] if x.dim() > 2 else x.unsqueeze(1)
    seen = windows(x, module)
    n_space = len(module.kernel_size)
    index = _unravel(positions, seen.shape[2 : 2 + n_space])
    picked = seen.movedim(1, 1 + n_space)[(rows, *index)]
    return picked.flatten(2)


def _unravel(flat: Tensor, shape: torch.Size) -> list[Tensor]:
    index: list[Tensor] = []
    for size in reversed(shape):
        index.insert(0, flat % size)
        flat = flat // size
    return index


def n_positions(x: Tensor, module: nn.Module) -> int:
    """How many output positions the layer has per sample of x (N, C, *space)."""
    if not isinstance(module, Conv):
        return math.prod(x.shape[2:])
    pads = module._reversed_padding_repeated_twice
    space = [
        (size + pads[-2 * axis - 2] + pads[-2 * axis - 1] - dilation * (taps - 1) - 1) // stride + 1
        for axis, (size, taps, stride, dilation) in enumerate(
            zip(x.shape[2:], module.kernel_size, module.stride, module.dilation, strict=True)
        )
    ]
    return math.prod(space)
