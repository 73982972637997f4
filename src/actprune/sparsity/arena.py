"""Memory for the temporaries of a step, kept from one step to the next.

On a CPU fresh memory of some MiB is handed out page by page and given back when freed: for temporaries as large as
the parameters that takes as long as the arithmetic. On a GPU torch keeps freed memory itself.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor


class Arena:
    """Hands out tensors one after the other from one buffer; ``reset`` makes all of it free again."""

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self._buffer = torch.empty(0, device=device, dtype=dtype)
        self._used = 0

    def reset(self) -> None:
        """Take everything back; what was handed out before must not be used any more."""
        if self._used > len(self._buffer):
            self._buffer = self._buffer.new_empty(self._used)
        self._used = 0

    def take(self, shape: Sequence[int]) -> Tensor:
        """An uninitialised tensor; from fresh memory while the buffer is too small, and always on a GPU."""
        if self._buffer.device.type != "cpu":
            return self._buffer.new_empty(shape)
        start, self._used = self._used, self._used + math.prod(shape)
        if self._used > len(self._buffer):
            return self._buffer.new_empty(shape)
        return self._buffer[start : self._used].view(shape)
