"""Where values of tensors decide what code does next: numbers, lists and arrays that it reads, masks that pick."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map_only

from actprune.core.operands import named_arguments

_LISTING = {Tensor.tolist, Tensor.numpy, Tensor.__array__, Tensor.__dlpack__}
_INDEXING = {"index", "_unsafe_index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index_put"}
_FILLED_BY_MASK = {
    torch.ops.aten.index_put.default: torch.ops.aten.masked_fill.Tensor,
    torch.ops.aten.index_put_.default: torch.ops.aten.masked_fill_.Tensor,
}
_MASKED = {"masked_select", "masked_scatter", "masked_scatter_"}
NUMBER = "_local_scalar_dense"
"""The operator that reads a number."""
_ASKING = {NUMBER, "equal", "allclose"}


def as_fill(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
    """One number written wherever a mask of the tensor's shape says (``x[x < 0] = 0``) is ``masked_fill``, as in PyTorch 2.15.

    Any other call is returned as it is.
    """
    if func not in _FILLED_BY_MASK:
        return func, args, kwargs
    given = named_arguments(func, args, kwargs)
    x, indices, value = given["self"], given["indices"], given["values"]
    mask = indices[0] if len(indices) == 1 else None
    if mask is None or mask.dtype != torch.bool or mask.shape != x.shape:
        return func, args, kwargs
    if value.dim() or value.dtype != x.dtype or given["accumulate"]:
        return func, args, kwargs
    return _FILLED_BY_MASK[func], (x, mask, value), {}


def deciding(func: Any, args: Sequence[Any]) -> list[Tensor]:
    """Arguments whose values are read, or say how many are picked or have to be given: of an index only masks do."""
    name = func.overloadpacket.__name__ if func.namespace == "aten" else ""
    if name in _INDEXING:
        return [x for x in args[1] if x is not None and x.dtype in (torch.bool, torch.uint8)]
    if name in _MASKED:
        return [args[1]]
    if name in _ASKING or torch.Tag.dynamic_output_shape in func.tags:
        return [x for x in tree_leaves(args) if isinstance(x, Tensor)]
    return []


def with_values(func: Any, args: Sequence[Any], before: Sequence[Tensor], values: Sequence[Tensor]) -> tuple[Any, ...]:
    """The same arguments with other values in place of what decides; what is indexed or written stays what it is."""
    taken = {id(x): value for x, value in zip(before, values, strict=True)}
    first = 1 if func.namespace == "aten" and func.overloadpacket.__name__ in _INDEXING | _MASKED else 0
    return (*args[:first], *tree_map_only(Tensor, lambda x: taken.get(id(x), x), tuple(args[first:])))


def opaque(func: Any) -> bool:
    """Whether an operator is of another library, so that its results may be as long as data say: what ``nms`` keeps."""
    return bool(func.namespace not in ("aten", "prims"))


class Listing(TorchFunctionMode):
    """Inside the block lists and arrays are made of what ``of`` returns: their values leave tensors without an operator."""

    def __init__(self, of: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self._of: Callable[[Tensor], Tensor] | None = of

    def __exit__(self, *error: Any) -> None:
        """What is left of the block keeps nothing alive."""
        super().__exit__(*error)
        self._of = None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # noqa: D102
        out = func(*args, **(kwargs or {}))
        if func in _LISTING and self._of is not None:
            with _disable_current_modes():  # what runs here is none of the model's operators
                if (other := self._of(args[0])) is not args[0]:
                    out = func(other, *args[1:], **(kwargs or {}))
        return out
