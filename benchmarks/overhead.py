"""What observing costs in a validation epoch, and how the ranking from a few positions agrees with that from all.

    python benchmarks/overhead.py [--weights resnet56-jpeg.th --data DIR] [--threads 2] [--repeats 5] [--positions 64]

ResNet-56 on CIFAR-10-sized inputs, batches of 256. For every criterion the same epoch runs plain and observed, batch by batch
in turns, so that what else the machine does weighs on both alike; the ratio is the median over epochs. How much of the
processors others used meanwhile is printed beside it. Bars: entropy 1.10, linear Rademacher
complexity with 64 replicates 1.15, zero rate, mean, variance and RMS 1.05, all of the activation criteria at once, without
HRank, 1.35. Rows with mean compensation observe for that, too. Below: Spearman's rho, mean over
groups, of the scores from sampled positions and from all (bar 0.98) on ``--images`` images, and what the statistics keep in
memory. DIR holds test/CLASS/*.jpg; without data and weights the network is untrained and sees noise, which is enough for times
only.
"""

from __future__ import annotations

import argparse
import copy
import importlib.metadata
import json
import math
import os
import platform
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from images import decode, files, sample
from provenance import commit
from torch import Tensor

from actprune import Budget, Pruner, criteria
from actprune.compensation import Mean
from actprune.core.ranks import spearman
from actprune.core.views import Criterion
from actprune.models.resnet import CifarResNet
from actprune.pruning import Panel
from actprune.statistics import POSITIONS

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


def epoch(plain: CifarResNet, watched: CifarResNet, batches: list[Tensor], pruner: Pruner) -> tuple[float, float]:
    """Seconds of one epoch as a trainer's validation runs it, plain and observed, batch by batch in turns."""
    seconds = [0.0, 0.0]
    began = time.perf_counter()
    with torch.inference_mode(), pruner.observe() as observation:
        seconds[1] += time.perf_counter() - began
        for number, x in enumerate(batches):
            for side in (0, 1) if number % 2 else (1, 0):
                began = time.perf_counter()
                if side:
                    observation.begin_batch(torch.arange(number * BATCH, number * BATCH + len(x)))
                (watched if side else plain)(x)
                seconds[side] += time.perf_counter() - began
    return seconds[0], seconds[1]


def times(plain: CifarResNet, watched: CifarResNet, batches: list[Tensor], pruner: Pruner, repeats: int) -> dict[str, float]:
    """Medians over the epochs of their seconds and of their ratio, and the share of the processors that others used."""
    epoch(plain, watched, batches[:1], pruner)
    before, others = time.perf_counter(), used_by_others()
    found = [epoch(plain, watched, batches, pruner) for _ in range(repeats)]
    others = (used_by_others() - others) / (time.perf_counter() - before) / (os.cpu_count() or 1)
    ratios = [b / a for a, b in found]
    return {
        "plain": statistics.median(a for a, _ in found),
        "observed": statistics.median(b for _, b in found),
        "ratio": statistics.median(ratios),
        "least": min(ratios),
        "most": max(ratios),
        "others": others,
    }


def used_by_others() -> float:
    """Processor seconds that other processes have used since the machine was started (Linux; NaN elsewhere)."""
    try:
        fields = Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:]
    except OSError:
        return math.nan
    busy = sum(int(fields[k]) for k in (0, 1, 2, 5, 6, 7))
    return busy / os.sysconf("SC_CLK_TCK") - time.process_time()


def scores(model: CifarResNet, x: Tensor, panel: Panel, positions: int | None) -> dict[str, dict[str, Tensor]]:
    pruner = pruner_of(model, panel, positions, None)
    with torch.no_grad(), pruner.observe() as observation:
        for number, batch in enumerate(x.split(BATCH)):
            observation.begin_batch(torch.arange(number * BATCH, number * BATCH + len(batch)))
            model(batch)
    pruner.scores(observation)
    return panel.scores


def agreement(model: CifarResNet, x: Tensor, positions: int) -> dict[str, dict[str, float]]:
    """Spearman's rho of the scores from a few positions and from all: mean over groups, and least."""
    full, few = (
        scores(model, x, Panel({name: criterion() for name, criterion in ALONE.items()}), k) for k in (None, positions)
    )
    print(f"\nSpearman, {positions} positions against all, {len(full)} groups, {len(x):,} images; bar {AGREES}")
    agreed = {}
    for name in ALONE:
        each = [spearman(few[group][name], full[group][name]) for group in full]
        agreed[name] = {"mean": statistics.mean(each), "least": min(each)}
        print(f"{name:<28}{agreed[name]['mean']:>8.4f}   least group {agreed[name]['least']:.3f}", flush=True)
    return agreed


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
    parser.add_argument("--batches", type=int, default=20, help="per epoch")
    parser.add_argument("--images", type=int, default=2000, help="behind the rank correlations; 0: none are taken")
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

    plain = copy.deepcopy(model)
    print(
        f"ResNet-56, batches of {BATCH}, {args.threads} threads, {args.positions} positions per map; medians of "
        f"{args.repeats} epochs of {args.batches} batches: seconds plain and observed, their ratio (least, most)"
    )
    print(f"{'':<28}{'plain':>8}{'observed':>10}{'ratio':>8}{'':>16}{'bar':>7}{'others':>8}{'bytes':>13}", flush=True)
    rows = {}
    for name in args.only:
        kinds = {"": None, ", mean compensation": Mean()} if name in ("entropy", "all at once") else {"": None}
        for extra, compensation in kinds.items():
            row = times(plain, model, batches, pruner_of(model, made[name], args.positions, compensation), args.repeats)
            rows[name + extra] = row
            row["bytes"] = memory(model, made[name])
            bar = f"{BARS[name]:.2f}" if name in BARS and not extra else ""
            spread = f"({row['least']:.3f}, {row['most']:.3f})"
            print(
                f"{name + extra:<28}{row['plain']:>8.2f}{row['observed']:>10.2f}{row['ratio']:>8.3f}{spread:>16}{bar:>7}"
                f"{row['others']:>8.1%}{row['bytes']:>13,}",
                flush=True,
            )

    agreed = agreement(model, x[: args.images], args.positions) if args.images else {}
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
