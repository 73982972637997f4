"""An optimizer goes on after surgery: new parameters in its groups, its state cut like the parameter it belongs to.

State of the parameter's shape is sliced (momenta and second moments of every torch.optim class, SparseAdam's and Muon's
too); state whose dimensions are the parameter's with some reduced to 1 (Adafactor's row and column moments) is sliced where
it is full, and the Adafactor of transformers, which drops such dimensions; scalars stay; LBFGS keeps flat vectors over all
parameters, so its history starts again. Optimizers inside others (Lookahead, SAM) are optimizers too.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor
from torch.optim import LBFGS, Optimizer
from torch.utils._pytree import tree_leaves

from actprune.core.errors import SurgeryError
from actprune.surgery.tensors import sliced
from actprune.surgery.transaction import Transaction

_AVERAGED = {"exp_avg_sq_row": -1, "exp_avg_sq_col": -2}  # the Adafactor of transformers: moment -> dimension that is gone


def with_wrapped(optimizers: Iterable[Optimizer]) -> list[Optimizer]:
    """The optimizers and, after each, those in its attributes, which step the same parameters with a state of their own."""
    found: dict[int, Optimizer] = {}

    def visit(optimizer: Optimizer) -> None:
        if id(optimizer) not in found:  # one inside may know what it is inside of
            found[id(optimizer)] = optimizer
            for value in vars(optimizer).values():
                if isinstance(value, Optimizer):
                    visit(value)

    for optimizer in optimizers:
        visit(optimizer)
    return list(found.values())


def _dims(optimizer: Optimizer, key: object, state: Tensor, parameter: Tensor) -> list[int] | None:
    """The parameter's dimension for each of the state's; None: the state does not follow the parameter's shape."""
    dims = list(range(parameter.dim()))
    if type(optimizer).__module__.startswith("transformers.") and key in _AVERAGED and len(dims) > 1:
        del dims[_AVERAGED[str(key)]]
    if len(dims) != state.dim() or any(s not in (1, parameter.shape[d]) for s, d in zip(state.shape, dims, strict=True)):
        return None
    return dims


def check(optimizer: Optimizer, old: Tensor) -> None:
    """Refuse before anything is cut what cannot be cut right.

    Raises:
        SurgeryError: the optimizer holds state of a shape that does not follow the parameter's.
    """
    if isinstance(optimizer, LBFGS):
        return
    # where the shape decides what is kept, a narrower parameter would have something else
    by_shape = any("min_dim_size_to_factor" in group for group in optimizer.param_groups)
    for key, value in optimizer.state.get(old, {}).items():
        for tensor in (leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor) and leaf.numel() > 1):
            dims = _dims(optimizer, key, tensor, old) if tensor is value else None
            if dims is None or (by_shape and tensor.shape != old.shape):
                raise SurgeryError(
                    f"{type(optimizer).__name__} keeps {key!r} of shape {tuple(tensor.shape)} for a parameter of shape "
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
    optimizer.state[new] = {key: _slice(optimizer, key, value, old, dims) for key, value in state.items()}
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
            if any(parameter is new for parameter in group["params"]):  # a wrapped optimizer, whose groups are the wrapper's
                return
            if "param_names" in group:
                place = next(i for i, parameter in enumerate(group["params"]) if parameter is beside)
                group["param_names"].append(group["param_names"][place].removesuffix("weight") + "bias")
                changes.did(lambda group=group: group["param_names"].pop())  # type: ignore[misc]
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


def _slice(optimizer: Optimizer, key: object, value: object, old: Tensor, dims: Mapping[int, Tensor]) -> object:
    mine = _dims(optimizer, key, value, old) if isinstance(value, Tensor) and value.numel() > 1 else None
    if mine is None:
        return value
    assert isinstance(value, Tensor)
    places = {place: dim for place, dim in enumerate(mine) if dim in dims and old.shape[dim] > 1}
    full = {place: dims[dim] for place, dim in places.items() if value.shape[place] == old.shape[dim]}
    with torch.no_grad():
        return sliced(value, full)
