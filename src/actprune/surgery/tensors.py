"""Replace parameters and buffers by smaller ones, everywhere they are held."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from actprune.core.errors import SurgeryError
from actprune.surgery.transaction import Transaction


def keep_indices(size: int, gone: list[int]) -> Tensor:
    """Positions that stay of a dimension."""
    stays = np.ones(size, bool)
    stays[np.fromiter(gone, np.int64, len(gone))] = False
    return torch.from_numpy(np.flatnonzero(stays))


def sliced(tensor: Tensor, dims: Mapping[int, Tensor]) -> Tensor:
    """A contiguous copy that keeps the given positions of the given dimensions."""
    for dim, keep in dims.items():
        tensor = tensor.index_select(dim, keep.to(tensor.device))
    return tensor if tensor.is_sparse else tensor.contiguous()


class Holders:
    """Where a model holds each of its tensors; one walk over the modules for any number of replacements."""

    def __init__(self, model: nn.Module) -> None:
        self._at: dict[Tensor, list[tuple[str, dict[str, Any], str]]] = {}
        for path, module in model.named_modules():
            for holder in (module._parameters, module._buffers, vars(module)):
                for key, value in holder.items():
                    if isinstance(value, Tensor):
                        self._at.setdefault(value, []).append((path, holder, key))

    def replace(self, old: Tensor, new: Tensor, changes: Transaction) -> list[str]:
        """Put ``new`` wherever ``old`` is held (tied weights stay tied); return the paths of the modules that hold it."""
        found = self._at[old]

        def back() -> None:
            for _, holder, key in found:
                holder[key] = old

        changes.did(back)
        for _, holder, key in found:
            holder[key] = new
        self._at[new] = found
        return [path for path, _, _ in found]


def lookup(model: nn.Module, name: str) -> Tensor:
    """The parameter, buffer or plain tensor attribute of this name.

    Raises:
        SurgeryError: the model has none.
    """
    path, _, leaf = name.rpartition(".")
    try:
        module = model.get_submodule(path)
        tensor = getattr(module, leaf)
    except AttributeError:
        tensor = None
    if not isinstance(tensor, Tensor):
        raise SurgeryError(
            f"the plan names {name!r}, which {type(model).__name__} does not have; pass the model that was traced, "
            "or a fresh one of the same architecture"
        )
    return tensor


def smaller(old: Tensor, dims: Mapping[int, Tensor], shift: Tensor | None) -> Tensor:
    """A new parameter or buffer: shifted, then sliced; dtype, device, ``requires_grad``, gradient and its hooks follow.

    Args:
        old: the tensor as it is.
        dims: dimension -> positions that stay.
        shift: what compensation adds first, in the old shape, or None.
    """
    with torch.inference_mode(False), torch.no_grad():
        data = old.detach()
        if shift is not None:
            exact = torch.promote_types(old.dtype, torch.float64)
            data = (data.to(exact) + shift.to(data.device, exact)).to(old.dtype)
        data = sliced(data, dims) if dims else data.clone()
        if not isinstance(old, nn.Parameter):
            return data
        new = nn.Parameter(data, requires_grad=old.requires_grad)
        if old.grad is not None:
            new.grad = sliced(old.grad, dims)
    for key, value in vars(old).items():
        setattr(new, key, value)
    follow_hooks(old, new)
    return new


def follow_hooks(old: Tensor, new: Tensor) -> None:
    """Let the gradient hooks of a parameter act on the one in its place too; what removes them removes them from both."""
    for hooks in ("_backward_hooks", "_post_accumulate_grad_hooks"):
        if getattr(old, hooks) is not None:
            setattr(new, hooks, getattr(old, hooks))
