"""Lipschitz constants (spectral norms) of layers, in the Euclidean norm of whole maps.

Exact where the structure allows it, iterated elsewhere:

- linear layers and 1x1 convolutions: singular values of the weight matrix (a stride only drops positions);
- convolutions that wrap around with stride 1 and keep the size: the map is block diagonal in Fourier space (Sedghi, Gupta and
  Long, "The singular values of convolutional layers", ICLR 2019);
- batch norms in evaluation mode: the largest scale;
- everything else (zero, reflecting or replicating padding, strides, transposed): ``largest_singular_value``.

github.com/rkwitt/excess_capacity iterates strided circular convolutions without their stride, which gives the constant of
another map, at least as large; here the stride is part of the map.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from actprune.capacity.maps import LinearMap
from actprune.capacity.singular import largest_singular_value


def lipschitz_constant(layer: LinearMap, *, tolerance: float = 1e-5) -> float:
    """The spectral norm of a layer's map; iterated values are approached from below, see ``largest_singular_value``."""
    if layer.weight.numel() == 0:
        return 0.0
    if layer.kind == "scale":
        return float(layer.weight.abs().max())
    if layer.kind == "linear":
        return _norm(layer.weight)
    if is_pointwise(layer):
        return max(_norm(part.flatten(1)) for part in layer.weight.chunk(layer.groups))
    if is_circulant(layer):
        return float(torch.linalg.matrix_norm(blocks(on_grid(layer), layer.groups), ord=2).max())
    return largest_singular_value(layer, layer.input_shape, like=layer.weight, tolerance=tolerance)[0]


def is_pointwise(layer: LinearMap) -> bool:
    """Whether a convolution mixes channels position by position."""
    if layer.kind != "convolution" or any(n != 1 for n in layer.weight.shape[2:]):
        return False
    return not any(layer.padding)


def is_circulant(layer: LinearMap) -> bool:
    """Whether a convolution wraps around, with stride 1, into as many positions as it reads."""
    if layer.kind != "convolution" or layer.mode != "circular" or any(n != 1 for n in layer.stride):
        return False
    windows = zip(layer.weight.shape[2:], layer.dilation, strict=True)
    added = [before + after for before, after in zip(layer.padding[::2], layer.padding[1::2], strict=True)][::-1]
    return all(dilation * (k - 1) == more for (k, dilation), more in zip(windows, added, strict=True))


def blocks(grid: Tensor, groups: int) -> Tensor:
    """Fourier coefficients (groups, frequencies, out / groups, in / groups) of whole-grid kernels (out, in / groups, *size).

    The singular values of all these matrices together are those of the convolution that wraps around; frequencies are the half
    that a real kernel needs.
    """
    found = torch.fft.rfftn(grid, dim=tuple(range(2, grid.dim()))).flatten(2)
    return found.reshape(groups, -1, *found.shape[1:]).permute(0, 3, 1, 2)


def from_blocks(matrices: Tensor, shape: torch.Size) -> Tensor:
    """Inverse of ``blocks``, into kernels of ``shape`` on the whole grid."""
    size = shape[2:]
    found = matrices.permute(0, 2, 3, 1).reshape(*shape[:2], *size[:-1], size[-1] // 2 + 1)
    return torch.fft.irfftn(found, s=size, dim=tuple(range(2, len(shape))))


def on_grid(layer: LinearMap) -> Tensor:
    """The kernel (out, in / groups, *size) on the grid of positions it wraps around; taps that meet there add up."""
    size = layer.input_shape[1:]
    grid = layer.weight.new_zeros(*layer.weight.shape[:2], *size)
    taps = torch.cartesian_prod(*(torch.arange(k, device="cpu") for k in layer.weight.shape[2:])).reshape(-1, layer.spatial)
    for tap in taps.tolist():
        place = tuple(t * d % n for t, d, n in zip(tap, layer.dilation, size, strict=True))
        grid[(..., *place)] += layer.weight[(..., *tap)]
    return grid


def off_grid(grid: Tensor, layer: LinearMap) -> Tensor:
    """The kernel that ``on_grid`` laid out, where no two of its taps meet."""
    taps = [torch.arange(k, device="cpu") * d for k, d in zip(layer.weight.shape[2:], layer.dilation, strict=True)]
    index: tuple[Any, ...] = (..., *torch.meshgrid(*taps, indexing="ij"))
    return grid[index]


def _norm(matrix: Tensor) -> float:
    return float(torch.linalg.matrix_norm(matrix, ord=2))
