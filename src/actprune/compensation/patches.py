"""What a layer reads together: a convolution's patch of C channels times kernel taps, a linear layer's C inputs.

A convolution is the matrix product of its weight, flattened to (out, C * taps), with the patch at every output position.
Stride, dilation and every padding mode are the layer's own; zeros of the padding count as what they are.
"""

from __future__ import annotations

import math
from typing import TypeGuard

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from actprune.statistics import at_positions

Conv = nn.modules.conv._ConvNd
Transposed = nn.modules.conv._ConvTransposeNd


def reads_patches(module: nn.Module, weight: Tensor) -> TypeGuard[Conv]:
    """Whether the layer is an ordinary convolution with this weight: neither transposed nor grouped."""
    return isinstance(module, Conv) and not isinstance(module, Transposed) and module.weight is weight and module.groups == 1


def pads_zeros(module: nn.Module, weight: Tensor) -> bool:
    """Whether the layer is an ordinary convolution whose taps may meet zeros of a padding."""
    return reads_patches(module, weight) and module.padding_mode == "zeros" and any(module._reversed_padding_repeated_twice)


def taps_seen(module: nn.Module, space: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Which taps meet the map, not its padding: patterns (M, taps) and the share of output positions of each (M,), float64."""
    assert isinstance(module, Conv)
    seen = windows(torch.ones(1, 1, *space, dtype=torch.uint8, device="cpu"), module)[0, 0].flatten(len(space)).flatten(0, -2)
    patterns, counts = torch.unique(seen, dim=0, return_counts=True)
    return patterns.double(), counts.double() / len(seen)


def windows(
    x: Tensor,  # (N, C, *space)
    conv: Conv,
) -> Tensor:
    """Every patch of a convolution, a view of the padded input: (N, C, *output positions, *taps)."""
    x = padded(x, conv)
    n_space = len(conv.kernel_size)
    for axis, (taps, stride, dilation) in enumerate(zip(conv.kernel_size, conv.stride, conv.dilation, strict=True)):
        x = x.unfold(2 + axis, dilation * (taps - 1) + 1, stride)
        if dilation > 1:
            x = x[..., ::dilation]
    assert x.dim() == 2 + 2 * n_space
    return x


def padded(
    x: Tensor,  # (N, C, *space)
    conv: Conv,
) -> Tensor:
    """Put the convolution's own padding around x."""
    pads = conv._reversed_padding_repeated_twice
    if not any(pads):
        return x
    return F.pad(x, pads, mode="constant" if conv.padding_mode == "zeros" else conv.padding_mode)


def patches_at(
    x: Tensor,  # (N, C, *space)
    module: nn.Module,
    positions: Tensor,  # (N, P) flat output positions of every sample
) -> Tensor:
    """What the layer reads at the given positions: (N, P, C * taps), or (N, P, C) for a layer that is no convolution."""
    if not isinstance(module, Conv):
        return at_positions(x.flatten(2), positions).transpose(1, 2) if x.dim() > 2 else x.unsqueeze(1)
    space = torch.Size(output_space(x, module))
    x = padded(x, module)
    corner = torch.zeros((), dtype=torch.int64, device=x.device)
    taps = torch.zeros(1, dtype=torch.int64, device=x.device)
    axes = zip(_unravel(positions, space), x.shape[2:], module.stride, module.dilation, module.kernel_size, strict=True)
    for place, size, stride, dilation, extent in axes:
        corner = corner * size + place * stride
        taps = (taps.unsqueeze(1) * size + torch.arange(extent, device=x.device) * dilation).flatten()
    # one gather of single numbers: many times faster than picking from the windows, which copies short strided runs
    picked = at_positions(x.flatten(2), (corner.unsqueeze(2) + taps).flatten(1))  # (N, C, P taps)
    return picked.unflatten(2, (-1, len(taps))).transpose(1, 2).flatten(2)


def _unravel(flat: Tensor, shape: torch.Size) -> list[Tensor]:
    index: list[Tensor] = []
    for size in reversed(shape):
        index.insert(0, flat % size)
        flat = flat // size
    return index


def n_positions(x: Tensor, module: nn.Module) -> int:
    """How many output positions the layer has per sample of x (N, C, *space)."""
    return math.prod(output_space(x, module))


def output_space(x: Tensor, module: nn.Module) -> list[int]:
    """The extent of what the layer makes of x (N, C, *space)."""
    if not isinstance(module, Conv):
        return list(x.shape[2:])
    pads = module._reversed_padding_repeated_twice
    return [
        (size + pads[-2 * axis - 2] + pads[-2 * axis - 1] - dilation * (taps - 1) - 1) // stride + 1
        for axis, (size, taps, stride, dilation) in enumerate(
            zip(x.shape[2:], module.kernel_size, module.stride, module.dilation, strict=True)
        )
    ]
