"""Merge statistics: shards of one process, or ranks of a process group, with one sum over one flat buffer.

Two steps. ``align``: what is no sum (ranges, references) is maximised over the shards, and every statistic moves its
sums to that common scale. Then all sum states of all statistics are added as one float64 vector; counts stay exact up
to 2^53. Every rank must hold the same statistics in the same order.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torchmetrics.utilities import dim_zero_sum

from actprune.core.views import Statistic
from actprune.statistics.base import Accumulator


def pack_scales(statistics: Sequence[Statistic], device: torch.device | None = None) -> Tensor:
    """All numbers that have to be maximised over shards, as one flat float64 vector (empty when there are none)."""
    return _flat([value for statistic in statistics for value in statistic.scale().values()], device or statistics[0].device)


def align(statistics: Sequence[Statistic], shared: Tensor) -> None:
    """Bring every statistic to the scale ``shared``: ``pack_scales``, maximised over the shards."""
    offset = 0
    for statistic in statistics:
        own = statistic.scale()
        common = {}
        for key, value in own.items():
            common[key] = shared[offset : offset + value.numel()].view(value.shape).to(value.device)
            offset += value.numel()
        if own:
            _own_states(statistic)
            statistic.aligned(common)


def pack(statistics: Sequence[Statistic], device: torch.device | None = None) -> Tensor:
    """All sum states, as one flat float64 vector; add the vectors of aligned shards."""
    return _flat([state for statistic in statistics for state in _sums(statistic)], device or statistics[0].device)


def unpack(statistics: Sequence[Statistic], total: Tensor) -> None:
    """Put a sum of ``pack`` vectors back into the statistics, in place."""
    offset = 0
    for statistic in statistics:
        _own_states(statistic)
        for state in _sums(statistic):
            state.copy_(total[offset : offset + state.numel()].view(state.shape))
            offset += state.numel()


def merge_shards(shards: Sequence[Sequence[Statistic]]) -> Sequence[Statistic]:
    """Merge shards of one process into the first; the others are moved to the common scale and otherwise left alone.

    Args:
        shards: for every shard the same statistics in the same order.

    Returns:
        The statistics of the first shard, which now hold everything.
    """
    device = shards[0][0].device
    shared = torch.stack([pack_scales(shard, device) for shard in shards]).amax(0)
    for shard in shards:
        align(shard, shared)
    unpack(shards[0], torch.stack([pack(shard, device) for shard in shards]).sum(0))
    return shards[0]


def all_reduce(
    statistics: Sequence[Statistic], group: dist.ProcessGroup | None = None, device: torch.device | None = None
) -> None:
    """Merge the statistics of all ranks of ``group``, on every rank: one sum, and one maximum where a scale exists.

    Args:
        statistics: the same on every rank, in the same order.
        group: of processes; None: all.
        device: where the sums are made, of one kind on all ranks; None: where the first statistic is, which on a rank that saw
            nothing of it is the CPU.
    """
    if not statistics:
        return
    shared = pack_scales(statistics, device)
    if shared.numel():
        dist.all_reduce(shared, dist.ReduceOp.MAX, group=group)
        align(statistics, shared)
    total = pack(statistics, device)
    dist.all_reduce(total, dist.ReduceOp.SUM, group=group)
    unpack(statistics, total)


def _own_states(statistic: Statistic) -> None:
    if isinstance(statistic, Accumulator):
        statistic.own_states()


def _sums(statistic: Statistic) -> list[Tensor]:
    """The states that add up over shards; torchmetrics keeps the name of a reduction as the function it stands for."""
    return [getattr(statistic, name) for name, reduction in statistic._reductions.items() if reduction is dim_zero_sum]


def _flat(parts: Sequence[Tensor], device: torch.device) -> Tensor:
    empty = torch.zeros(0, dtype=torch.float64, device=device)
    return torch.cat([empty, *(part.flatten().to(device, torch.float64) for part in parts)])
