"""Which part of what a network returns is its outputs, one row per sample."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_leaves

from actprune.core.errors import ObservationError


def logits_of(said: Any, n: int) -> Tensor:
    """What the network says of ``n`` samples.

    A tensor; of a mapping its ``logits``; else the first floating-point tensor in it whose first dimension counts the samples.

    Raises:
        ObservationError: there is none.
    """
    if isinstance(said, Mapping):
        said = dict(said) if said.get("logits") is None else said["logits"]
    tensors = [x for x in tree_leaves(said) if isinstance(x, Tensor)]
    for x in tensors:
        if x.is_floating_point() and x.dim() > 0 and len(x) == n:
            return x
    shapes = ", ".join(str(tuple(x.shape)) for x in tensors) or "no tensor"
    raise ObservationError(f"the network returned {shapes}; one output must be floating-point and begin with the {n} samples")
