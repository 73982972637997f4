"""What observing costs in a validation epoch, and how the ranking from a few positions agrees with that from all.

    python benchmarks/overhead.py [--weights resnet56-jpeg.th --data DIR] [--threads 2] [--repeats 5] [--positions K]
    python benchmarks/overhead.py --device cuda
    python benchmarks/overhead.py --network vit --images 0

ResNet-56, or a vision transformer of 6 blocks of width 128 on 64 patches, on CIFAR-10-sized inputs, batches of 256. For every
criterion the same epoch runs plain and observed, batch by batch in turns, so that what else the machine does weighs on both
alike; the ratio is the median over epochs. How much of the processors others used meanwhile is printed beside it. The C
library is told to keep freed memory (Linux): else each forward maps its activations anew or does not, by chance, which weighs
more than what is measured (ResNet-56: 0 or 170,000 page faults per batch, 250 or 470 ms). Bars, for ResNet-56: entropy 1.10,
linear Rademacher complexity with 64 replicates 1.15, zero rate, mean, variance and RMS 1.05, all of the activation criteria
at once, without HRank, 1.35; on a GPU 1.05 for each. There whole epochs take turns, each waited for before the clock is read,
and the last column says how often a batch, once two were seen, made the host wait for the device (0 is due; where it is more,
the lines that did so follow). Rows with mean compensation observe for that, too. Below: Spearman's rho, mean over groups, of
the scores from sampled positions and from all (bar 0.98) on ``--images`` images, and what the statistics keep in memory. DIR
holds test/CLASS/*.jpg; without data and weights the network is untrained and sees noise, which is enough for times only.
"""

from __future__ import annotations

import argparse
import copy
import ctypes
import importlib.metadata
import json
import math
import os
import platform
import statistics
import time
import warnings
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from images import decode, files, sample
from provenance import commit
from torch import Tensor, nn
from torchvision.models.vision_transformer import VisionTransformer

from actprune import Budget, Pruner, criteria
from actprune.compensation import Mean
from actprune.core.ranks import spearman
from actprune.core.views import Criterion
from actprune.models.resnet import CifarResNet
from actprune.pruning import Observation, Panel
from actprune.statistics import Density, enough

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
GPU_BAR = 1.05
ALONE: dict[str, Callable[[], Criterion]] = {
    "entropy": criteria.Entropy,
    "state_entropy": criteria.StateEntropy,
    "rademacher": partial(criteria.Rademacher, estimate="monte_carlo", replicates=64),
    "zero_rate": criteria.ZeroRate,
    "mean_activation": criteria.MeanActivation,
    "variance": criteria.Variance,
    "rms": criteria.RMS,
}
MANY = 5120
AGREES = 0.98
Positions = int | Literal["auto"] | None


def network(name: str, weights: str | None) -> nn.Module:
    """ResNet-56, or a transformer whose plain epochs take PyTorch's fast path."""
    if name == "resnet56":
        return CifarResNet(56, weights=weights)
    return VisionTransformer(32, 4, num_layers=6, num_heads=4, hidden_dim=128, mlp_dim=512, num_classes=10)


def pruner_of(model: nn.Module, criterion: Criterion, positions: Positions, compensation: Mean | None) -> Pruner:
    example = torch.zeros(1, 3, 32, 32, device=next(model.parameters()).device)
    return Pruner(model, example, criterion, Budget(params=0.5), compensation=compensation, positions=positions)


def epoch(plain: nn.Module, watched: nn.Module, batches: list[Tensor], pruner: Pruner, first: int = 0) -> Tensor:
    """Seconds of one epoch as a trainer's validation runs it, plain and observed, in turns: by batch, on a GPU by epoch.

    ``first``: 0 or 1, which side begins.

    Returns:
        (2, 2) plain and observed; on the clock and of processor time.
    """
    seconds = torch.zeros(2, 2, dtype=torch.float64)
    on_gpu = batches[0].is_cuda
    began = now(on_gpu)
    with torch.inference_mode(), pruner.observe(len(batches) * BATCH) as observation:
        seconds[1] += now(on_gpu) - began
        for turn in [range(len(batches))] if on_gpu else [range(k, k + 1) for k in range(len(batches))]:
            for side in (first, 1 - first) if turn.start % 2 else (1 - first, first):
                began = now(on_gpu)
                for number in turn:
                    if side:
                        announce(observation, number, batches[number])
                    (watched if side else plain)(batches[number])
                seconds[side] += now(on_gpu) - began
        began = now(on_gpu)
        _ = observation.scores  # what still waited is counted
        seconds[1] += now(on_gpu) - began
    return seconds


def now(on_gpu: bool) -> Tensor:
    """(2,) the clock, and processor time so far, once everything that was launched has been done."""
    if on_gpu:
        torch.cuda.synchronize()
    return torch.tensor([time.perf_counter(), time.process_time()], dtype=torch.float64)


def read(positions: Positions, images: int) -> str:
    """What is read of large maps, in words."""
    density = Density(positions) if isinstance(positions, int) else enough(images)
    return f"{density.positions} positions per map" + (" of every second image" if density.halved else "")


def keep_memory() -> None:
    """Freed memory stays with the process, on both sides alike; nothing happens where the C library has no such setting."""
    trim_threshold, mmap_threshold = -1, -3
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return
    mallopt(trim_threshold, 1 << 30)
    mallopt(mmap_threshold, 1 << 25)  # the greatest that is accepted


def number(said: str) -> Positions:
    return "auto" if said == "auto" else int(said)


def announce(observation: Observation, number: int, x: Tensor) -> None:
    observation.begin_batch(range(number * BATCH, number * BATCH + len(x)))


def waits(model: nn.Module, batches: list[Tensor], pruner: Pruner) -> list[str]:
    """Where the host waits for the device in observed batches after the second, one entry per time (file and line)."""
    with torch.inference_mode(), pruner.observe(MANY) as observation:
        announce(observation, 0, batches[0])
        model(batches[0])
        announce(observation, 1, batches[1])  # what sites have in common is found out, and brought to the device, here
        model(batches[1])
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                for number, x in enumerate(batches[2:], 2):
                    announce(observation, number, x)
                    model(x)
            finally:
                torch.cuda.set_sync_debug_mode("default")
    return [f"{w.filename}:{w.lineno}" for w in caught if "synchronizing" in str(w.message)]


def times(plain: nn.Module, watched: nn.Module, batches: list[Tensor], pruner: Pruner, repeats: int) -> dict[str, float]:
    """Medians over the epochs of their seconds and of their ratio, and the share of the processors that others used."""
    epoch(plain, watched, batches[:1], pruner)
    before, others = time.perf_counter(), used_by_others()
    found = [epoch(plain, watched, batches, pruner, k % 2) for k in range(repeats)]
    others = (used_by_others() - others) / (time.perf_counter() - before) / (os.cpu_count() or 1)
    clock = [seconds[:, 0].tolist() for seconds in found]
    ratios = [b / a for a, b in clock]
    return {
        "plain": statistics.median(a for a, _ in clock),
        "observed": statistics.median(b for _, b in clock),
        "cpu_ratio": statistics.median(float(seconds[1, 1] / seconds[0, 1]) for seconds in found),
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


def scores(model: nn.Module, x: Tensor, panel: Panel, positions: Positions) -> dict[str, dict[str, Tensor]]:
    pruner = pruner_of(model, panel, positions, None)
    with torch.no_grad(), pruner.observe(len(x)) as observation:
        for number, batch in enumerate(x.split(BATCH)):
            announce(observation, number, batch)
            model(batch)
    pruner.scores(observation)
    return panel.scores


def agreement(model: nn.Module, x: Tensor, positions: Positions) -> dict[str, dict[str, float]]:
    """Spearman's rho of the scores from a few positions and from all: mean over groups, and least."""
    full, few = (
        scores(model, x, Panel({name: criterion() for name, criterion in ALONE.items()}), k) for k in (None, positions)
    )
    print(f"\nSpearman, {read(positions, len(x))} against all, {len(full)} groups, {len(x):,} images; bar {AGREES}")
    agreed = {}
    for name in ALONE:
        each = [spearman(few[group][name], full[group][name]) for group in full]
        agreed[name] = {"mean": statistics.mean(each), "least": min(each)}
        print(f"{name:<28}{agreed[name]['mean']:>8.4f}   least group {agreed[name]['least']:.3f}", flush=True)
    return agreed


def memory(model: nn.Module, criterion: Criterion) -> int:
    """Bytes of all states, at every site."""
    observation = pruner_of(model, criterion, None, None).observation()
    every = (s for by_key in observation.scores.values() for sites in by_key.values() for s in sites)
    return sum(state.numel() * state.element_size() for s in every for state in s.metric_state.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", choices=("resnet56", "vit"), default="resnet56")
    parser.add_argument("--weights", default=None, help="of ResNet-56")
    parser.add_argument("--data", type=Path, default=None)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--batches", type=int, default=None, help="per epoch; 20, on a GPU 100")
    parser.add_argument("--images", type=int, default=5120, help="behind the rank correlations; 0: none are taken")
    parser.add_argument("--positions", type=number, default="auto", help="per map; auto: what the number of images asks for")
    every = [*ALONE, "all at once"]
    parser.add_argument("--only", nargs="*", default=every, choices=every, help="criteria that are timed")
    parser.add_argument("--out", type=Path, default=None, help="JSON file")
    args = parser.parse_args()
    on_gpu = args.device == "cuda"
    args.batches = args.batches or (100 if on_gpu else 20)
    torch.set_num_threads(args.threads)
    keep_memory()
    torch.manual_seed(0)
    model = network(args.network, args.weights).eval().to(args.device)
    if args.data is None:
        x = torch.randn(max(args.images, args.batches * BATCH), 3, 32, 32)
    else:
        x, _ = decode(sample(files(args.data / "test"), max(args.images, args.batches * BATCH), 0))
        x = x.repeat(-(-args.batches * BATCH // len(x)), 1, 1, 1)  # an epoch may be longer than the test set
    x = x.to(args.device)
    made: dict[str, Criterion] = {name: ALONE[name]() for name in ALONE}
    made["all at once"] = Panel({name: criterion() for name, criterion in ALONE.items()})
    batches = list(x[: args.batches * BATCH].split(BATCH))

    plain = copy.deepcopy(model)
    device = f"one {torch.cuda.get_device_name()}" if on_gpu else f"{args.threads} threads"
    print(
        f"{args.network}, batches of {BATCH}, {device}, {read(args.positions, args.batches * BATCH)}; medians of "
        f"{args.repeats} epochs of {args.batches} batches: seconds plain and observed, their ratio (least, most); "
        "cpu: the ratio of processor times"
    )
    print(
        f"{'':<28}{'plain':>8}{'observed':>10}{'ratio':>8}{'':>16}{'bar':>7}{'cpu':>7}{'others':>8}{'bytes':>13}"
        f"{'waits' if on_gpu else '':>8}",
        flush=True,
    )
    rows = {}
    for name in args.only:
        kinds = {"": None, ", mean compensation": Mean()} if name in ("entropy", "all at once") else {"": None}
        for extra, compensation in kinds.items():
            pruner = pruner_of(model, made[name], args.positions, compensation)
            row = times(plain, model, batches, pruner, args.repeats)
            rows[name + extra] = row
            row["bytes"] = memory(model, made[name])
            has_bar = args.network == "resnet56" and name in BARS and not extra
            bar = f"{GPU_BAR if on_gpu else BARS[name]:.2f}" if has_bar else ""
            spread = f"({row['least']:.3f}, {row['most']:.3f})"
            print(
                f"{name + extra:<28}{row['plain']:>8.2f}{row['observed']:>10.2f}{row['ratio']:>8.3f}{spread:>16}{bar:>7}"
                f"{row['cpu_ratio']:>7.3f}"
                f"{row['others']:>8.1%}{row['bytes']:>13,}",
                end="" if on_gpu else "\n",
                flush=True,
            )
            if on_gpu:
                where = waits(model, batches[:7], pruner)
                row["waits"] = len(where) / 5
                print(f"{row['waits']:>8.1f}")
                for line, times_ in Counter(where).most_common(8):
                    print(f"{'':>6}{times_:>5} in 5 batches at {line}", flush=True)

    agreed = agreement(model, x[: args.images], args.positions) if args.images else {}
    if args.out is not None:
        result = {
            "rows": rows,
            "spearman": agreed,
            "settings": {key: str(value) for key, value in vars(args).items()},
            "device": device,
            "versions": {name: importlib.metadata.version(name) for name in ("actprune", "torch")},
            "python": platform.python_version(),
            "commit": commit(),
        }
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
