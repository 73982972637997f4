"""Room for many small tensors that have to wait.

Between the large tensors that a network makes and drops, small ones that stay keep a CPU's allocator from using the same memory
again: forwards then touch new pages, which can cost more than all that is observed. One mapping of its own does not.
"""

from __future__ import annotations

import torch
from torch import Tensor


class Arena:
    """Tensors one after the other, in one allocation per type.

    Args:
        n_elements: room there is; only what is used becomes memory.
    """

    def __init__(self, n_elements: int) -> None:
        self._n_elements = n_elements
        self.is_full = False
        self._rooms: dict[torch.dtype, Tensor] = {}
        self._used: dict[torch.dtype, int] = {}

    def room(self, shape: tuple[int, int, int], dtype: torch.dtype) -> Tensor | None:
        """Room for a tensor on the CPU; None where all of it is taken."""
        n, used = shape[0] * shape[1] * shape[2], self._used.get(dtype, 0)
        if used + n > self._n_elements:
            self.is_full = True
            return None
        whole = self._rooms.get(dtype)
        if whole is None:
            with torch.inference_mode(False):
                whole = self._rooms[dtype] = torch.empty(self._n_elements, dtype=dtype, device="cpu")
        self._used[dtype] = used + n
        return whole.as_strided(shape, (shape[1] * shape[2], shape[2], 1), used)

    def clear(self) -> None:
        """Take all room back; nobody may use what lies there any more."""
        self._used.clear()
        self.is_full = False

    def release(self) -> None:
        """Take all room back, and give the memory back once nobody holds anything that lies there."""
        self.clear()
        self._rooms.clear()
