"""What tracing and cutting cost, beside plain forwards of the same model, on an idle machine.

    python benchmarks/graph_cost.py [--runs 5] [--peer]

Three tables, every time the median of ``--runs``. Large models of torchvision at batch 1: one forward, the trace, units built
from the trace, half of every group cut (drafted and executed together, without proof forwards), the whole of ``Pruner``
(trace, rehearsal of four cuts, repairs), and the memory of the process at its highest over a cut, in sizes of the model. Chains
of concatenations 32 to 256 layers deep: seconds per layer. ``--peer``: seconds until Torch-Pruning has pruned the same model.

Before each run what earlier ones left is collected, not meanwhile; that empties the processor's caches too, as they are where
a model is traced once. *At once*: run after run without a pause, where the state of a short chain stays in these caches.
"""

from __future__ import annotations

import argparse
import copy
import gc
import math
import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torchvision.models import get_model

import actprune
from actprune.graph.tracer import run
from actprune.graph.units import build
from actprune.pruning.plans import draft
from actprune.surgery import cut

MODELS = ("resnet50", "densenet201", "efficientnet_b7", "convnext_large", "swin_b", "vit_b_16", "vit_l_16")
DEPTHS = (32, 64, 128, 256)


class Chain(nn.Module):
    """Every layer reads the concatenation of all before it."""

    def __init__(self, depth: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Conv2d(4 * (i + 1), 4, 1) for i in range(depth))
        self.head = nn.Conv2d(4 * (depth + 1), 5, 1)

    def forward(self, x: Tensor) -> Tensor:  # (N, 4, H, W)
        """(N, 5, H, W)."""
        features = [x]
        for layer in self.layers:
            features.append(layer(torch.cat(features, 1)).relu())
        return self.head(torch.cat(features, 1))


def median(action: Callable[..., Any], runs: int, given: Callable[[], Any] | None = None, at_once: bool = False) -> float:
    """Seconds, the first run left out.

    Args:
        action: what is timed.
        runs: how often.
        given: makes what the action takes, before the clock starts.
        at_once: without collecting what the run before has left.
    """
    times = []
    for _ in range(runs + 1):
        arguments = () if given is None else (given(),)
        if not at_once:
            gc.collect()
        start = time.perf_counter()
        action(*arguments)
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])


def halves(graph: actprune.Graph) -> dict[str, list[int]]:
    """Every other unit of every group."""
    return {group.name: list(range(0, group.size - 1, 2)) for group in graph.unlocked}


def cutting(model: nn.Module, graph: actprune.Graph, runs: int, at_once: bool = False) -> float:
    """Seconds to draft and execute the cut of half of everything."""

    def halve(twin: nn.Module) -> None:
        cut(twin, draft(twin, graph, halves(graph)))

    return median(halve, runs, partial(copy.deepcopy, model), at_once)


def peak(action: Callable[[], Any]) -> int:
    """Highest number of bytes of tensors allocated and not freed since the action began."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        action()
    now = most = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            most = max(most, now)
    return most


def models(console: Console, runs: int, peer: bool) -> None:
    """Large models of torchvision."""
    table = Table("model", "forward", "trace", "of forwards", "units", "cut", "Pruner", "copies", "peer", title="seconds")
    for name in MODELS:
        model, x = get_model(name).eval(), torch.rand(1, 3, 224, 224)
        with torch.no_grad():
            forward = median(partial(model, x), runs)
        traced = median(partial(actprune.trace, model, x), runs)
        state = run(model, x)
        units = median(partial(build, state, model), runs)
        graph = actprune.trace(model, x)
        seconds = cutting(model, graph, runs)
        everything = actprune.criteria.Random(), actprune.Budget(params=1.0)
        whole = median(partial(actprune.Pruner, model, x, *everything, compensation=None), 1)
        twin, size = copy.deepcopy(model), sum(p.numel() * p.element_size() for p in model.parameters())
        most = peak(partial(cut, twin, draft(twin, graph, halves(graph))))
        theirs = f"{peer_seconds(model, x):.1f}" if peer else "-"
        table.add_row(
            name,
            f"{forward:.2f}",
            f"{traced:.2f}",
            f"{traced / forward:.1f}",
            f"{units:.2f}",
            f"{seconds:.2f}",
            f"{whole:.1f}",
            f"{most / size:.2f}",
            theirs,
        )
    console.print(table)


def peer_seconds(model: nn.Module, x: Tensor) -> float:
    """Torch-Pruning, half of every layer."""
    import torch_pruning as tp

    twin = copy.deepcopy(model)
    last = [m for m in twin.modules() if isinstance(m, nn.Linear)][-1:]
    start = time.perf_counter()
    tp.pruner.MetaPruner(twin, x, tp.importance.MagnitudeImportance(), pruning_ratio=0.5, ignored_layers=last).step()
    return time.perf_counter() - start


def chains(console: Console, runs: int, peer: bool) -> None:
    """What a layer reads, and so what a forward computes, grows with depth: read the seconds beside those of the forward."""
    parts = ("forward", "trace", "units", "cut", "the three", "the three, at once")
    table = Table("layers", *parts, "peer", title="dense chains, ms per layer")
    costs = []
    for depth in DEPTHS:
        model, x = Chain(depth).eval(), torch.rand(1, 4, 4, 4)
        state, graph = run(model, x), actprune.trace(model, x)
        with torch.no_grad():
            forward = median(partial(model, x), runs)
        once, again = (
            (
                median(partial(run, model, x), runs, at_once=at_once),
                median(partial(build, state, model), runs, at_once=at_once),
                cutting(model, graph, runs, at_once),
            )
            for at_once in (False, True)
        )
        costs.append((sum(once) / depth, sum(again) / depth))
        row = [1000 * seconds / depth for seconds in (forward, *once, sum(once), sum(again))]
        theirs = f"{1000 * peer_seconds(model, x) / depth:.1f}" if peer else "-"
        table.add_row(str(depth), *(f"{cost:.2f}" for cost in row), theirs)
    console.print(table)
    powers = [1 + statistics.linear_regression(*logs(each)).slope for each in zip(*costs, strict=True)]
    console.print("the three together: depth to the power of {:.2f}; at once {:.2f}".format(*powers))


def logs(costs: Sequence[float]) -> tuple[list[float], list[float]]:
    """Of depths, and of what a layer costs at each."""
    return [math.log(depth) for depth in DEPTHS], [math.log(cost) for cost in costs]


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--peer", action="store_true", help="time Torch-Pruning too; its time grows with depth")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    console = Console(width=100)
    chains(console, args.runs, args.peer)
    models(console, args.runs, args.peer)


if __name__ == "__main__":
    main()
