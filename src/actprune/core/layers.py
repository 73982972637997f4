"""Which layers compute what PyTorch wrote, on what they are given."""

from __future__ import annotations

import inspect
from typing import Any

from torch import nn


def runs_torch_forward(module: nn.Module) -> bool:
    """Whether a layer runs PyTorch's forward for it, so that its weight reads what the layer is given, as it is given.

    A subclass that pads, scales, permutes or masks first has a forward of its own; so has an instance that was patched.
    """
    convolve: Any = getattr(type(module), "_conv_forward", None)
    return all(_of_torch(function) for function in (module.forward, convolve) if function is not None)


def _of_torch(function: Any) -> bool:
    return getattr(inspect.unwrap(function), "__module__", "").startswith("torch.nn.modules.")
