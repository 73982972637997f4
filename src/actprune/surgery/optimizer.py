"""An optimizer goes on after surgery: new parameters in its groups, its state cut like the parameter it belongs to.

State of the parameter's shape is sliced (momenta and second moments of every torch.optim class, SparseAdam's and Muon's
too); state whose dimensions are the parameter's with some reduced to 1 (Adafactor's row and column moments) is sliced where
it is full; scalars stay; LBFGS keeps flat vectors over all parameters, so its history starts again.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.optim import LBFGS, Optimizer

from actprune.core.errors import SurgeryError
from actprune.surgery.tensors import sliced
from actprune.surgery.transaction import Transaction


def _follows(state: Tensor, parameter: Tensor) -> bool:
    same_rank = state.dim() == parameter.dim()
    return same_rank and all(s in (1, p) for s, p in zip(state.shape, parameter.shape, strict=True))


def check(optimizer: Optimizer, old: Tensor) -> None:
    """Refuse before anything is cut what cannot be cut right.

    Raises:
        SurgeryError: the optimizer holds state of a shape that does not follow the parameter's.
    """
    if isinstance(optimizer, LBFGS):
        return
    for key, value in optimizer.state.get(old, {}).items():
        if isinstance(value, Tensor) and value.numel() > 1 and not _follows(value, old):
            raise SurgeryError(
                f"{type(optimizer).__name__} keeps {key!r} of shape {tuple(value.shape)} for a parameter of shape "
                f"{tuple(old.shape)}: which rows leave is unknown; use an optimizer whose state has the parameter's shape"
            )


def follow(optimizer: Optimizer, old: Tensor, new: Tensor, dims: Mapping[int, Tensor], changes: Transaction) -> None:
    """Swap one parameter in an optimizer, with its state.

    Args:
        optimizer: any torch optimizer, stepped or not.
        old: the parameter before the cut.
        new: the parameter that takes its place.
        dims: dimension -> positions that stay.
        changes: takes everything back on failure.
    """
    for group in optimizer.param_groups:
        for i, parameter in enumerate(group["params"]):
            if parameter is old:
                _swap(group["params"], i, new, changes)
                _forget(optimizer, changes)
    if old not in optimizer.state:
        return
    state = optimizer.state.pop(old)
    changes.did(lambda: optimizer.state.__setitem__(old, state))
    optimizer.state[new] = {key: _slice(value, old, dims) for key, value in state.items()}
    changes.did(lambda: optimizer.state.pop(new))


def add(optimizer: Optimizer, beside: Tensor, new: Tensor, changes: Transaction) -> None:
    """Let the optimizer train a new parameter with the settings of the group that holds ``beside``.

    Raises:
        SurgeryError: the optimizer trains matrices only.
    """
    for group in optimizer.param_groups:
        if any(parameter is beside for parameter in group["params"]):
            if type(optimizer).__name__ == "Muon" and new.dim() != 2:
                raise SurgeryError(
                    f"compensation gives a bias to a layer whose weight of shape {tuple(beside.shape)} Muon trains, and Muon "
                    "takes matrices only; pass compensation=None, or build the layer with a bias that another optimizer trains"
                )
            group["params"].append(new)
            changes.did(lambda group=group: group["params"].pop())  # type: ignore[misc]
            _forget(optimizer, changes)
            return


def _forget(optimizer: Optimizer, changes: Transaction) -> None:
    """Start LBFGS again: its history is kept at the first parameter, whichever one changes."""
    if not isinstance(optimizer, LBFGS):
        return
    state, numel = dict(optimizer.state), optimizer._numel_cache
    optimizer.state.clear()
    optimizer._numel_cache = None
    changes.did(lambda: setattr(optimizer, "_numel_cache", numel))
    changes.did(lambda: optimizer.state.update(state))


def _swap(params: list[Tensor], i: int, new: Tensor, changes: Transaction) -> None:
    old = params[i]
    params[i] = new
    changes.did(lambda: params.__setitem__(i, old))


def _slice(value: object, old: Tensor, dims: Mapping[int, Tensor]) -> object:
    if not isinstance(value, Tensor) or value.numel() <= 1 or not _follows(value, old):
        return value
    full = {dim: keep for dim, keep in dims.items() if value.shape[dim] == old.shape[dim] and old.shape[dim] > 1}
    with torch.no_grad():
        return sliced(value, full)
