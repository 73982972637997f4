"""Seconds and memory of post-training pruning with least squares, stage by stage, on random weights and images.

    python benchmarks/compensation_cost.py --model resnet56 [--samples 2000] [--keep 0.5] [--threads 1] [--out FILE]
    python benchmarks/compensation_cost.py --model resnet50 --samples 64

Memory is the process's own peak, what it holds of libraries and images included; every stage says the peak so far. CPU
seconds are those of all threads together: where other work runs, they say more than the seconds on the clock.
"""

from __future__ import annotations

import argparse
import copy
import json
import platform
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torchvision
from torch import Tensor, nn

from actprune import Budget, Pruner, criteria
from actprune.compensation import LeastSquares
from actprune.models.resnet import CifarResNet
from actprune.pruning.batches import observe_pairs, pairs_of
from actprune.pruning.finishing import finish

MODELS: dict[str, tuple[Callable[[], nn.Module], int, int]] = {
    "resnet20": (lambda: CifarResNet(20), 32, 250),
    "resnet56": (lambda: CifarResNet(56), 32, 250),
    "resnet50": (lambda: torchvision.models.resnet50(), 224, 16),
}
"""Name -> network, height and width of its images, images per batch."""
LIMITS = {"resnet56": (60, None), "resnet50": (300, 8.0)}
"""Seconds and GiB that all stages may take."""


def peak() -> float:
    """GiB that this process has held at most."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def stages(name: str, samples: int, keep: float) -> dict[str, dict[str, float]]:
    """Stage -> seconds and peak memory so far."""
    make, size, batch = MODELS[name]
    torch.manual_seed(0)
    model = make().eval()
    x = torch.randn(samples, 3, size, size)
    found: dict[str, dict[str, float]] = {}

    def timed(stage: str, work: Callable[[], Any]) -> Any:
        began, cpu = time.perf_counter(), time.process_time()
        result = work()
        one = {"seconds": time.perf_counter() - began, "cpu_seconds": time.process_time() - cpu, "peak_gib": peak()}
        print(f"  {stage:<30}{one['seconds']:>8.1f} s{one['cpu_seconds']:>8.1f} s CPU{one['peak_gib']:>8.2f} GiB", flush=True)
        found[stage] = one
        return result

    how = LeastSquares()
    pairs = list(pairs_of(x.split(batch), x[:1]))
    timed("bare forward, for comparison", lambda: _forward(model, x, batch))
    pruner = timed("tracing", lambda: Pruner(model, x[:1], criteria.Reconstruction(), Budget(macs=keep), None, how))
    observation = timed("observing", lambda: observe_pairs(pruner, pairs))
    original = copy.deepcopy(model)
    plan = timed("scoring and folding", lambda: pruner.plan(observation))
    timed("cutting", lambda: pruner.execute(plan))
    timed("refitting", lambda: finish(model, original, pruner.graph, plan, [a for a, _ in pairs], how))
    return found


@torch.no_grad()
def _forward(model: nn.Module, x: Tensor, batch: int) -> None:
    for part in x.split(batch):
        model(part)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=list(MODELS), default="resnet56")
    parser.add_argument("--samples", type=int, default=2000, help="images")
    parser.add_argument("--keep", type=float, default=0.5, help="share of the MACs that is left")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=None, help="JSON file")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    print(f"{args.model}, {args.samples:,} random images, MACs left {args.keep:.0%}, {args.threads} threads")
    found = stages(args.model, args.samples, args.keep)
    own = [stage for name, stage in found.items() if not name.startswith("bare")]
    total, cpu = (sum(stage[key] for stage in own) for key in ("seconds", "cpu_seconds"))
    limit = LIMITS.get(args.model)
    within = f"; the bar: {limit[0]} s" + (f", {limit[1]:.0f} GiB" if limit[1] else "") if limit else ""
    print(f"all stages: {total:.1f} s, {cpu:.1f} s CPU, {peak():.2f} GiB{within}")
    if args.out is not None:
        settings = {key: str(value) for key, value in vars(args).items()}
        versions = {"python": platform.python_version(), "torch": torch.__version__, "machine": platform.machine()}
        totals = {"seconds": total, "cpu_seconds": cpu, "gib": peak()}
        args.out.write_text(json.dumps({**settings, **versions, "stages": found, **totals}, indent=1) + "\n")


if __name__ == "__main__":
    main()
