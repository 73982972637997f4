"""What values decide during a trace. A rehearsed cut is told the same, so that only a width can make it do something else."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeAlias

import torch
from torch import Tensor

from actprune.core.stack import Frame
from actprune.graph.ids import Ids

if TYPE_CHECKING:
    from actprune.graph.state import TraceState

Read: TypeAlias = tuple[str, int, int]
"""(module, call, which of the call's reads)."""
_MOST = 2**26


@dataclass(frozen=True)
class Told:
    """Values of what was read, and the ids of every dimension where they are known."""

    values: tuple[Tensor, ...]
    ids: tuple[tuple[Ids, ...], ...]


@dataclass
class Reads:
    """What every call reads, in order, if somebody is to be told; of what is beyond 64 MiB nothing is kept."""

    keeps: bool
    told: dict[Read, Told] = field(default_factory=dict)
    _size: int = 0

    def add(self, t: TraceState, tensors: Sequence[Tensor], results: bool = False) -> None:
        """The running call reads these tensors, or their values are results that may be as long as data say."""
        if not self.keeps or t.training or not tensors:
            return
        read = next_read(t.frames[-1])
        values = tuple(_shape(x) if results and x.is_floating_point() else x for x in tensors)
        size = sum(x.numel() * x.element_size() for x in values if not x.is_meta)
        if self._size + size <= _MOST and all(x.layout == torch.strided and not x.is_quantized for x in values):
            self._size += size
            ids = tuple(tuple(t.ids(x)) if t.known(x) else () for x in tensors)
            self.told[read] = Told(tuple(x.detach().clone() for x in values), ids)

    def listed(self, t: TraceState, tensor: Tensor) -> Tensor:
        """A list or an array is made of a tensor."""
        self.add(t, [tensor])
        return tensor


def next_read(frame: Frame) -> Read:
    """Count a call's reads."""
    frame.reads += 1
    return frame.path, frame.call, frame.reads


def _shape(x: Tensor) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device="meta")
