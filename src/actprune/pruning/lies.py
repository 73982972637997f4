"""How what a place reads lies in memory: batches mostly lie alike, and what is known before needs no look when it comes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from actprune.core.tensors import is_ordinary

Looks = tuple[tuple[int, ...], tuple[int, ...], torch.dtype, torch.device]
"""Shape, stride, type and device of a tensor."""


@dataclass(frozen=True)
class Lies:
    """A batch of (N, C, P) activations inside a tensor of any shape."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    samples: int
    channels: int
    positions: int
    steps: tuple[int, int, int]
    """From one sample, channel, position to the next."""
    is_all: bool
    """Whether the tensor has nothing else, in this order."""

    @property
    def in_rows(self) -> bool:
        """Whether a position's channels lie next to each other."""
        return self.steps[1] == 1 < self.positions

    def rows(self, x: Tensor) -> Tensor:
        """The C elements from each one on, as they lie in memory, (last first element of a row + 1, C)."""
        return x.as_strided((self._last(1) + 1, self.channels), (1, 1))

    def flat(self, x: Tensor) -> Tensor:
        """All elements from the first one on, as they lie in memory."""
        return x.as_strided((self._last(self.channels) + 1,), (1,))

    def _last(self, channels: int) -> int:
        """Where the last element of so many channels lies."""
        sizes = (self.samples, channels, self.positions)
        return sum((n - 1) * step for n, step in zip(sizes, self.steps, strict=True))

    def maps(self, x: Tensor) -> Tensor:
        """The activations, (N, C, P)."""
        return x.as_strided((self.samples, self.channels, self.positions), self.steps)

    @property
    def looks(self) -> Looks:
        """What tells a tensor that lies like this."""
        return self.shape, self.stride, self.dtype, self.device

    def of(self, samples: int) -> Lies | None:
        """The same with another number of samples, where it is plain how they would lie."""
        if samples == self.samples:
            return self
        plain = self.shape[0] == self.samples and self.steps[0] == self.stride[0] >= self.steps[2] * self.positions
        return replace(self, shape=(samples, *self.shape[1:]), samples=samples) if plain and samples else None


def lies(
    read: Tensor,  # as it was given
    x: Tensor,  # (N, C, *positions), perhaps a view of it
) -> Lies | None:
    """How activations lie in what was read; None where they are no view, or positions are not evenly apart."""
    if not is_ordinary(read) or not x.numel() or x.data_ptr() != read.data_ptr() or x.dtype != read.dtype:
        return None
    step = _even(x.shape[2:], x.stride()[2:])
    positions = math.prod(x.shape[2:])
    if step is None or step == 0 < positions - 1:
        return None
    steps = (x.stride(0), x.stride(1), step)
    same = read.is_contiguous() and x.is_contiguous() and read.numel() == x.numel()
    is_all = same and read.stride(0) == math.prod(read.shape[1:])  # of one sample a part may count as contiguous
    return Lies(tuple(read.shape), read.stride(), x.dtype, x.device, len(x), x.shape[1], positions, steps, is_all)


def _even(shape: Sequence[int], stride: Sequence[int]) -> int | None:
    """The step from each position to the next, the last dimension first; None where it differs; 1 without positions."""
    many = [(n, step) for n, step in zip(shape, stride, strict=True) if n > 1]
    for (_, outer), (n, inner) in zip(many, many[1:], strict=False):
        if outer != n * inner:
            return None
    return many[-1][1] if many else 1
