"""What observing costs in a validation epoch, and how the ranking from a few positions agrees with that from all.

    python benchmarks/overhead.py [--weights resnet56-jpeg.th --data DIR] [--threads 2] [--repeats 5] [--positions 64]

ResNet-56 on CIFAR-10-sized inputs, batches of 256. For every criterion the same epoch runs plain and observed, in turns, so
that what else the machine does weighs on both alike; the ratio is that of the medians. Bars: entropy 1.10, linear Rademacher
complexity with 64 replicates 1.15, zero rate, mean, variance and RMS 1.05, all of the activation criteria at once, without
HRank, 1.35. The last rows have the default compensation on, which observes for itself. Below: Spearman's rho, mean over
groups, of the scores from sampled positions and from all (bar 0.98) on ``--images`` images, and what the statistics keep in
memory. DIR holds test/CLASS/*.jpg; without data and weights the network is untrained and sees noise, which is enough for times
only.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import platform
import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from actprune import Budget, Pruner, criteria
from actprune.compensation import Mean
from actprune.core.ranks import spearman
from actprune.core.views import Criterion
from actprune.models.resnet import CifarResNet
from actprune.pruning import Panel
from actprune.statistics import POSITIONS
from compensation import commit, decode, files, sample

BATCH = 256
BARS = {
    "entropy": 1.10,
    "rademacher": 1.15,
    "zero_rate": 1.05,
    "mean_activation": 1.05,
    "variance": 1.05,
    "rms": 1.05,
    "all at once": 1.35,
}
ALONE: dict[str, Callable[[], Criterion]] = {
    "entropy": criteria.Entropy,
    "state_entropy": criteria.StateEntropy,
    "rademacher": partial(criteria.Rademacher, estimate="monte_carlo", replicates=64),
    "zero_rate": criteria.ZeroRate,
    "mean_activation": criteria.MeanActivation,
    "variance": criteria.Variance,
    "rms": criteria.RMS,
}
AGREES = 0.98


def pruner_of(model: CifarResNet, criterion: Criterion, positions: int | None, compensation: Mean | None) -> Pruner:
    example = torch.zeros(1, 3, 32, 32)
    return Pruner(model, example, criterion, Budget(params=0.5), compensation=compensation, positions=positions)


def epoch(model: CifarResNet, batches: list[Tensor], pruner: Pruner | None) -> float:
    """Seconds of one epoch as a trainer's validation runs it."""
    began = time.perf_counter()
    with torch.inference_mode(), pruner.observe() if pruner else nullcontext() as observation:
        for number, x in enumerate(batches):
            if observation is not None:
                observation.begin_batch(torch.arange(number * BATCH, number * BATCH + len(x)))
            model(x)
    return time.perf_counter() - began


def times(model: CifarResNet, batches: list[Tensor], pruner: Pruner, repeats: int) -> tuple[float, float]:
    """Median seconds of the plain and of the observed epoch."""
    plain, observed = [], []
    epoch(model, batches[:1], pruner)
    for _ in range(repeats):
        plain.append(epoch(model, batches, None))
        observed.append(epoch(model, batches, pruner))
    return statistics.median(plain), statistics.median(observed)


def scores(model: CifarResNet, x: Tensor, panel: Panel, positions: int | None) -> dict[str, dict[str, Tensor]]:
    pruner = pruner_of(model, panel, positions, None)
    with torch.no_grad(), pruner.observe() as observation:
        for number, batch in enumerate(x.split(BATCH)):
            observation.begin_batch(torch.arange(number * BATCH, number * BATCH + len(batch)))
            model(batch)
    pruner.scores(observation)
    return panel.scores


def memory(model: CifarResNet, criterion: Criterion) -> int:
    """Bytes of all states, at every site."""
    observation = pruner_of(model, criterion, None, None).observation()
    every = (s for by_key in observation.scores.values() for sites in by_key.values() for s in sites)
    return sum(state.numel() * state.element_size() for s in every for state in s.metric_state.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", default=None)
    parser.add_argument("--data", type=Path, default=None)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--batches", type=int, default=20, help="per epoch that is timed")
    parser.add_argument("--images", type=int, default=2000, help="behind the rank correlations")
    parser.add_argument("--positions", type=int, default=POSITIONS, help="per map")
    parser.add_argument("--only", nargs="*", default=[*ALONE, "all at once"], help="criteria that are timed")
    parser.add_argument("--out", type=Path, default=None, help="JSON file")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    model = CifarResNet(56, weights=args.weights).eval()
    if args.data is None:
        x = torch.randn(max(args.images, args.batches * BATCH), 3, 32, 32)
    else:
        x, _ = decode(sample(files(args.data / "test"), max(args.images, args.batches * BATCH), 0))
    made: dict[str, Criterion] = {name: ALONE[name]() for name in ALONE}
    made["all at once"] = Panel({name: criterion() for name, criterion in ALONE.items()})
    batches = list(x[: args.batches * BATCH].split(BATCH))

    print(
        f"ResNet-56, batches of {BATCH}, {args.threads} threads, {args.positions} positions per map; seconds per epoch, medians"
    )
    print(f"{'':<34}{'plain':>8}{'observed':>10}{'ratio':>8}{'bar':>7}{'bytes':>13}", flush=True)
    rows = {}
    for name in args.only:
        plain, observed = times(model, batches, pruner_of(model, made[name], args.positions, None), args.repeats)
        rows[name] = {"plain": plain, "observed": observed, "ratio": observed / plain, "bytes": memory(model, made[name])}
        bar = f"{BARS[name]:.2f}" if name in BARS else ""
        print(f"{name:<34}{plain:>8.2f}{observed:>10.2f}{observed / plain:>8.3f}{bar:>7}{rows[name]['bytes']:>13,}", flush=True)
    for name in (name for name in ("entropy", "all at once") if name in args.only):
        plain, observed = times(model, batches, pruner_of(model, made[name], args.positions, Mean()), args.repeats)
        rows[f"{name}, mean compensation"] = {"plain": plain, "observed": observed, "ratio": observed / plain}
        print(f"{name + ', mean compensation':<34}{plain:>8.2f}{observed:>10.2f}{observed / plain:>8.3f}", flush=True)

    panel = Panel({name: criterion() for name, criterion in ALONE.items()})
    full = scores(model, x[: args.images], panel, None)
    panel = Panel({name: criterion() for name, criterion in ALONE.items()})
    few = scores(model, x[: args.images], panel, args.positions)
    print(f"\nSpearman, {args.positions} positions against all, {len(full)} groups, {args.images:,} images; bar {AGREES}")
    agreed = {}
    for name in ALONE:
        each = [spearman(few[group][name], full[group][name]) for group in full]
        agreed[name] = {"mean": statistics.mean(each), "least": min(each)}
        print(f"{name:<34}{agreed[name]['mean']:>8.4f}   least group {agreed[name]['least']:.3f}", flush=True)
    if args.out is not None:
        result = {
            "rows": rows,
            "spearman": agreed,
            "settings": {key: str(value) for key, value in vars(args).items()},
            "versions": {name: importlib.metadata.version(name) for name in ("actprune", "torch")},
            "python": platform.python_version(),
            "commit": commit(),
        }
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
