"""One rank of test_reduce: observes its share of the samples, merges, saves what it has and how often it spoke."""

import sys

import torch
import torch.distributed as dist

from actprune.statistics import (
    Activity,
    ClassHistogram,
    GateTaylor,
    Histogram,
    LinearRademacher,
    Moments,
    Sensitivity,
    all_reduce,
)


def build():
    return [
        Histogram(4),
        Histogram(4, bins=16, range="unit", pool="gap"),
        LinearRademacher(4),
        LinearRademacher(4, replicates=8, pool="positions"),
        Moments(4),
        Activity(4),
        ClassHistogram(4, classes=3),
        GateTaylor(4),
        Sensitivity(4),
    ]


def feed(statistics, x, ids, batch):
    for part, part_ids in zip(x.split(batch), ids.split(batch), strict=True):
        for statistic in statistics:
            statistic.update(part, part_ids, part_ids % 3)


def data():
    generator = torch.Generator().manual_seed(11)
    x = torch.randn(41, 4, 9, generator=generator) * torch.tensor([1.0, 1e-3, 50.0, 1.0])[:, None]
    x[:, 3] += 1e4
    x[20:] *= 3
    return x.clamp(min=-0.5), torch.arange(41)


def main(rank, world, store, out):
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    x, ids = data()
    statistics = build()
    feed(statistics, x[rank::world], ids[rank::world], batch=6)
    spoken, send = [], dist.all_reduce

    def counted(tensor, op, group=None):
        spoken.append(str(op))
        send(tensor, op, group=group)

    dist.all_reduce = counted
    try:
        all_reduce(statistics)
    finally:
        dist.all_reduce = send
        dist.destroy_process_group()
    torch.save({"states": [s.metric_state for s in statistics], "spoken": spoken}, out)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4])
