"""Which widths the code compares and finds different: once a cut makes them equal, it may do something else.

``if x.shape != y.shape: x = self.proj(x)`` runs no projection where so many channels leave that both are as wide. Extents that
the code asks of tensors are therefore integers that say whom they are compared with.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from actprune.graph.state import Column, TraceState

_SHAPE = Tensor.shape.__get__  # type: ignore[attr-defined]
_SIZE = Tensor.size


class Width(int):
    """An extent of what may be cut; what is computed from it is a plain integer, and so is a copy."""

    told: Comparisons
    column: Column

    def __eq__(self, other: object) -> bool:
        """As integers; told where they differ."""
        self._compared(other)
        return int.__eq__(self, other)

    def __ne__(self, other: object) -> bool:
        """As integers; told where they differ."""
        self._compared(other)
        return int.__ne__(self, other)

    __hash__ = int.__hash__

    def __reduce__(self) -> Any:
        return int, (int(self),)

    def _compared(self, other: object) -> None:
        if isinstance(other, int) and int(self) != int(other):
            self.told.differ(self.column, other.column if isinstance(other, Width) else int(other))


class Comparisons(TorchFunctionMode):
    """Inside the block extents of tensors remember whose they are."""

    def __init__(self, state: TraceState) -> None:
        super().__init__()
        self._state: TraceState | None = state

    def __exit__(self, *error: Any) -> None:
        """What the code kept of extents tells nobody any more."""
        super().__exit__(*error)
        self._state = None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # noqa: D102
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if func == _SHAPE or func is _SIZE:
            columns = self._state.told(args[0]) if self._state is not None else []
            if len(columns) == args[0].dim():
                if isinstance(out, int):
                    dim = args[1] if len(args) > 1 else kwargs["dim"]
                    return self._width(out, columns[dim])
                return torch.Size([self._width(n, column) for n, column in zip(out, columns, strict=True)])
        return out

    def differ(self, one: Column, other: Column | int) -> None:
        """The code compared two extents that are not equal."""
        if self._state is not None:
            self._state.unequal.append((self._state.frames[-1].path, one, other))

    def _width(self, n: int, column: Column | None) -> int:
        if column is None:
            return n
        width = Width(n)
        width.told, width.column = self, column
        return width
