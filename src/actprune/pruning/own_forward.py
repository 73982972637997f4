"""Layers with a forward of their own: what their weight reads, and whether they say what a plain layer would say of it.

A class that pads first, casts or only renames its arguments computes its weight times what is read, plus its bias; one that
scales, masks or standardises does not, nor does a layer with a hook that changes what it returns. Numbers tell, on the batch
at hand.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from actprune.compensation.patches import Conv, n_positions, patches_at
from actprune.core.layers import runs_torch_forward
from actprune.core.operands import Operands
from actprune.statistics import at_positions

_ROUNDING = 2e-2
"""Largest difference, of the outputs' root mean square: bfloat16 and TF32 round to 8 and 11 bits."""


def has_own_forward(module: nn.Module) -> bool:
    """Whether numbers have to tell what a linear layer or a convolution computes."""
    plain = runs_torch_forward(module) and (isinstance(module, Conv) or type(module) is nn.Linear)
    return not plain or bool(module._forward_hooks)


def read_by(module: nn.Module, x: Tensor) -> Tensor:
    """What the weight reads where the module is given x: a convolution may have padded it, which runs it once more."""
    if not isinstance(module, Conv):
        return x
    found: list[Tensor] = []
    with Operands({(0, 0): [found.append]}):
        module.forward(x)
    return found[0] if found else x


def is_affine(
    module: Any,
    x: Tensor,  # (N, C, *space)
    out: Tensor,  # (N, outputs, *positions)
    positions: Tensor,  # (N, P) flat output positions of every sample
) -> bool:
    """Whether outputs at these positions are the weight times what it reads there, plus the bias, to rounding."""
    same = x.dim() == out.dim() and len(x) == len(out) and (x.shape[1], out.shape[1]) == tuple(module.weight.shape[1::-1])
    if not same or out[0, 0].numel() != n_positions(x, module):
        return False
    wanted = rows_at(out, positions)
    said = patches_at(x, module, positions).flatten(0, 1) @ module.weight.flatten(1).T
    said = said if module.bias is None else said + module.bias
    return bool((said - wanted).abs().max() <= _ROUNDING * wanted.square().mean().sqrt())


def rows_at(out: Tensor, positions: Tensor) -> Tensor:
    """(R, channels) of a map (N, channels, *space) at sampled positions."""
    picked = at_positions(out.flatten(2), positions).transpose(1, 2) if out.dim() > 2 else out.unsqueeze(1)
    return picked.flatten(0, 1).clone()


def channels_second(module: nn.Module, x: Tensor) -> Tensor:
    """(N, C, *space)."""
    if isinstance(module, Conv):
        return x
    return x.unsqueeze(0) if x.dim() == 1 else x.movedim(-1, 1)
