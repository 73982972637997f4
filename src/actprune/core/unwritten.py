"""Tensors that may be written to while a model runs, and hold their values afterwards.

A forward may write to parameters: a momentum encoder, a codebook, low-rank adapters that are merged in evaluation mode.
Copies of all tensors would double a model in memory, so one is made when the first operator is about to write.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes


class Unwritten(TorchDispatchMode):
    """Inside the block tensors may be written to or given other data; afterwards they are as they were.

    Args:
        tensors: which; what has no storage of its own, sparse tensors for one, is left out.
    """

    supports_higher_order_operators = True

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        super().__init__()
        self._data: list[tuple[Tensor, Tensor]] = []
        self._at: dict[int, torch.UntypedStorage] = {}
        self._before: list[tuple[torch.UntypedStorage, torch.UntypedStorage]] = []
        for tensor in tensors:
            storage = _storage(tensor)
            if storage is not None:
                self._data.append((tensor, tensor.data))
                self._at[storage] = tensor.untyped_storage()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # noqa: D102
        kwargs = kwargs or {}
        for place in _written(func):
            value = kwargs.get(place) if isinstance(place, str) else args[place] if place < len(args) else None
            for tensor in value if isinstance(value, (list, tuple)) else (value,):
                if isinstance(tensor, Tensor):
                    self._keep(tensor)
        return func(*args, **kwargs)

    def _keep(self, written: Tensor) -> None:
        storage = self._at.pop(_storage(written) or 0, None)
        if storage is not None:
            with _disable_current_modes():
                self._before.append((storage, storage.clone()))

    def __exit__(self, *error: Any) -> None:  # noqa: D105
        super().__exit__(*error)
        for storage, before in self._before:
            if storage.nbytes() != before.nbytes():
                storage.resize_(before.nbytes())
            storage.copy_(before, False)
        with torch.no_grad():
            for tensor, data in self._data:
                if not _is_over(tensor, data):
                    tensor.data = data


def _storage(tensor: Tensor) -> int | None:
    if tensor.layout is not torch.strided or tensor.is_meta or isinstance(tensor, torch.nn.parameter.UninitializedTensorMixin):  # type: ignore[attr-defined]
        return None
    try:
        return tensor.untyped_storage()._cdata
    except (NotImplementedError, RuntimeError):  # a wrapper that has no memory, or a tensor of ``torch.func``
        return None


def _is_over(tensor: Tensor, data: Tensor) -> bool:
    """Whether a tensor lies where it lay."""
    now, then = ((x.shape, x.stride(), x.storage_offset(), x.dtype, _storage(x)) for x in (tensor, data))
    return now == then


@functools.cache
def _written(func: Any) -> tuple[int | str, ...]:
    """Which arguments an operator writes to: positions, or names of those that are given by name."""
    schema = getattr(func, "_schema", None)
    if schema is None or not schema.is_mutable:
        return ()
    written = [(n, a) for n, a in enumerate(schema.arguments) if a.alias_info is not None and a.alias_info.is_write]
    return tuple(place for n, a in written for place in ((a.name,) if a.kwarg_only else (n, a.name)))
