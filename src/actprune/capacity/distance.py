"""The (2, 1) group norm of weights and their distance to initialisation in it (Graf et al. 2022, arXiv:2202.08070).

A group is what one output reads at one tap of the window: the l2 norm runs over input channels, the sum over outputs and taps.
"""

from __future__ import annotations

import torch
from torch import Tensor

from actprune.capacity.maps import LinearMap
from actprune.core.errors import ConfigError


def group_norm(weight: Tensor) -> Tensor:
    """The (2, 1) norm of a kernel (out, in / groups, *window) or matrix (out, in)."""
    return torch.linalg.vector_norm(weight, dim=1).sum()


def distance(layer: LinearMap, initial: LinearMap) -> float:
    """(2, 1) distance of a layer to its initialisation; of a scale, which is a convolution of every channel alone, l1.

    Raises:
        ConfigError: the two have different shapes.
    """
    if layer.weight.shape != initial.weight.shape:
        raise ConfigError(
            f"the weight has shape {tuple(layer.weight.shape)}, its initialisation {tuple(initial.weight.shape)}; "
            "cut the initial network the same way (apply_record)"
        )
    return float(group_norm(grouped(layer.weight - initial.weight, layer)))


def grouped(weight: Tensor, layer: LinearMap) -> Tensor:
    """A weight of the layer's shape with outputs first and what each of them reads second."""
    if layer.kind == "scale":
        return weight.unsqueeze(1)
    if layer.kind != "transposed":
        return weight
    per_group = torch.stack(weight.chunk(layer.groups))  # (groups, in / groups, out / groups, *window)
    return per_group.transpose(1, 2).flatten(0, 1)
