"""Accuracy after post-training pruning, against Torch-Pruning, at equal MACs on the same data, with no gradient step.

    python benchmarks/compensation.py --data DIR --weights DIR [--depth 56] [--keep 0.5] [--seeds 0 1 2]

DIR of data holds train/CLASS/*.jpg and test/CLASS/*.jpg (CIFAR-10, JPEG copy); DIR of weights holds resnetDEPTH-jpeg.th.
Every row is the median over calibration seeds: which training images are observed, and what drawn criteria draw. The peer
prunes the inner channels of every block, for its cut of the residual stream does not run with parameter-free shortcuts;
its ratio is bisected until its MACs are the largest that do not exceed the target. Both sides are counted by
``actprune.trace``. "recalibrated" is the same cut with batch-norm statistics recomputed on the same calibration images.
"""

from __future__ import annotations

import argparse
import copy
import importlib.metadata
import json
import logging
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch_pruning as tp
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

import actprune
from actprune import Budget, Selection, criteria
from actprune.compensation import LeastSquares, Mean, recalibrate
from actprune.models.resnet import CifarResNet

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
BATCH = 250
PEER = {
    "magnitude L1": lambda: tp.importance.MagnitudeImportance(p=1),
    "magnitude L2": lambda: tp.importance.MagnitudeImportance(p=2),
    "group norm L2": lambda: tp.importance.GroupMagnitudeImportance(p=2),
    "BN scale": tp.importance.BNScaleImportance,
    "LAMP": tp.importance.LAMPImportance,
    "FPGM": tp.importance.FPGMImportance,
    "Taylor": tp.importance.GroupTaylorImportance,
    "random": tp.importance.RandomImportance,
}
OURS = {
    "variance, cut plainly": (criteria.Variance, "global", lambda: None),
    "variance, mean folded": (criteria.Variance, "global", Mean),
    "variance, least squares once": (criteria.Variance, "uniform", lambda: LeastSquares(refit="once")),
    "random, least squares sequential": (criteria.Random, "uniform", LeastSquares),
    "variance, least squares sequential": (criteria.Variance, "uniform", LeastSquares),
    "reconstruction, least squares once": (criteria.Reconstruction, "global", lambda: LeastSquares(refit="once")),
    "reconstruction, uniform, sequential": (criteria.Reconstruction, "uniform", LeastSquares),
    "reconstruction, least squares sequential": (criteria.Reconstruction, "global", LeastSquares),
}
FINAL = "reconstruction, least squares sequential"


# --- data and network ---


def files(folder: Path) -> list[tuple[Path, int]]:
    classes = sorted(path for path in folder.iterdir() if path.is_dir())
    return [(file, label) for label, path in enumerate(classes) for file in sorted(path.glob("*.jpg"))]


def decode(entries: list[tuple[Path, int]]) -> tuple[Tensor, Tensor]:
    pixels = np.stack([np.asarray(Image.open(file).convert("RGB")) for file, _ in entries])
    x = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255
    x = (x - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
    return x.contiguous(), torch.tensor([label for _, label in entries])


def sample(entries: list[tuple[Path, int]], n: int | None, seed: int) -> list[tuple[Path, int]]:
    if n is None or n >= len(entries):
        return entries
    return [entries[i] for i in torch.randperm(len(entries), generator=torch.Generator().manual_seed(seed))[:n].tolist()]


@torch.no_grad()
def accuracy(model: nn.Module, x: Tensor, y: Tensor) -> float:
    model.eval()
    right = sum(int((model(a).argmax(1) == b).sum()) for a, b in zip(x.split(BATCH), y.split(BATCH), strict=True))
    return 100 * right / len(y)


# --- the two sides ---


def macs_of(model: nn.Module) -> int:
    return actprune.trace(model, torch.zeros(1, 3, 32, 32)).macs


def peer_cut(model: nn.Module, name: str, everywhere: bool, target: float, x: Tensor, y: Tensor, seed: int) -> nn.Module:
    """Bisect the pruning ratio; the random numbers are the same at every ratio."""
    inner = {f"{path}.conv1" for path, block in model.named_modules() if hasattr(block, "conv2")}
    gradients = gradients_of(model, x, y) if name == "Taylor" else {}

    def at(ratio: float) -> nn.Module:
        torch.manual_seed(seed)
        pruned = copy.deepcopy(model)
        layers = {path: m for path, m in pruned.named_modules() if isinstance(m, (nn.Conv2d, nn.Linear))}
        pruner = tp.pruner.BasePruner(
            pruned,
            x[:1],
            importance=PEER[name](),
            global_pruning=everywhere,
            pruning_ratio=ratio,
            max_pruning_ratio=0.95,
            ignored_layers=[m for path, m in layers.items() if path not in inner],
        )
        for path, gradient in gradients.items():
            pruned.get_parameter(path).grad = gradient.clone()
        pruner.step()
        pruned.zero_grad()
        return pruned

    return bisect(at, target)


def gradients_of(model: nn.Module, x: Tensor, y: Tensor) -> dict[str, Tensor]:
    """Gradients of the mean loss over all calibration images."""
    model = copy.deepcopy(model)
    for a, b in zip(x.split(BATCH), y.split(BATCH), strict=True):
        F.cross_entropy(model(a), b, reduction="sum").div(len(y)).backward()
    return {path: p.grad for path, p in model.named_parameters() if p.grad is not None}


def bisect(at: Callable[[float], nn.Module], target: float, steps: int = 8) -> nn.Module:
    low, high, best = 0.0, 0.95, None
    for _ in range(steps):
        middle = (low + high) / 2
        candidate = at(middle)
        if macs_of(candidate) > target:
            low = middle
        else:
            high, best = middle, candidate
    if best is None:
        raise RuntimeError(f"no pruning ratio up to 0.95 reaches {target:,.0f} MACs")
    return best


def recalibrated(model: nn.Module, x: Tensor) -> nn.Module:
    model = copy.deepcopy(model)
    recalibrate(model, list(x.split(BATCH)))
    return model


def our_cut(model: nn.Module, name: str, keep: float, x: Tensor, seed: int) -> tuple[nn.Module, float]:
    criterion, scope, how = OURS[name]
    pruned = copy.deepcopy(model)
    began = time.monotonic()
    actprune.prune(
        pruned,
        x[:1],
        x.split(BATCH),
        criterion=criterion(),
        budget=Budget(macs=keep),
        selection=Selection(scope=scope),
        compensation=how(),
        seed=seed,
    )
    return pruned, time.monotonic() - began


# --- the table ---


def measure(args: argparse.Namespace) -> dict:
    model = CifarResNet(args.depth, weights=str(Path(args.weights) / f"resnet{args.depth}-jpeg.th")).eval()
    train, test = files(Path(args.data) / "train"), files(Path(args.data) / "test")
    tx, ty = decode(sample(test, args.test, 0))
    whole = macs_of(model)
    rows: dict[str, dict[str, list[float]]] = {}
    before = accuracy(model, tx, ty)
    print(f"ResNet-{args.depth}: {before:.2f} % on {len(ty):,} test images, {whole:,} MACs", flush=True)

    def note(row: str, **values: float) -> None:
        for key, value in values.items():
            rows.setdefault(row, {}).setdefault(key, []).append(value)
        print(f"  {row:<52}" + "  ".join(f"{key} {value:.2f}" for key, value in values.items()), flush=True)

    for seed in args.seeds:
        x, y = decode(sample(train, args.samples, seed))
        for name in OURS if args.all else [FINAL]:
            pruned, seconds = our_cut(model, name, args.keep, x, seed)
            note(f"actprune: {name}", accuracy=accuracy(pruned, tx, ty), macs=macs_of(pruned) / whole, seconds=seconds)
        for name in args.peer:
            for everywhere in (False, True):
                pruned = peer_cut(model, name, everywhere, args.keep * whole, x, y, seed)
                note(
                    f"torch-pruning: {name}, {'global' if everywhere else 'uniform'}",
                    accuracy=accuracy(pruned, tx, ty),
                    recalibrated=accuracy(recalibrated(pruned, x), tx, ty),
                    macs=macs_of(pruned) / whole,
                )
    return {
        "depth": args.depth,
        "keep": args.keep,
        "seeds": args.seeds,
        "calibration_images": args.samples,
        "test_images": len(ty),
        "before": before,
        "macs_before": whole,
        "rows": {row: {key: statistics.median(found) for key, found in values.items()} for row, values in rows.items()},
        "all": rows,
        "versions": {name: importlib.metadata.version(name) for name in ("actprune", "torch", "torch-pruning")},
        "python": platform.python_version(),
        "threads": torch.get_num_threads(),
        "commit": commit(),
    }


def commit() -> str:
    found = subprocess.run(
        ["git", "describe", "--always", "--dirty"], capture_output=True, text=True, cwd=Path(__file__).parent, check=False
    )
    return found.stdout.strip() or "unknown"


def table(result: dict) -> str:
    lines = [
        f"ResNet-{result['depth']} / CIFAR-10 (JPEG copy), MACs left {result['keep']:.0%}, unpruned {result['before']:.2f} %,",
        f"{result['calibration_images']:,} calibration and {result['test_images']:,} test images, no gradient step,",
        f"median of seeds {', '.join(map(str, result['seeds']))}",
        "",
        f"{'':<52}{'MACs':>9}{'accuracy':>12}{'recalibrated':>15}",
    ]
    for row, values in sorted(result["rows"].items(), key=lambda item: -item[1]["accuracy"]):
        again = f"{values['recalibrated']:.2f}" if "recalibrated" in values else ""
        lines.append(f"{row:<52}{values['macs']:>9.1%}{values['accuracy']:>12.2f}{again:>15}")
    ours = result["rows"][f"actprune: {FINAL}"]["accuracy"]
    peer = [values for row, values in result["rows"].items() if row.startswith("torch-pruning")]
    if not peer:
        return "\n".join([*lines, "", f"under the unpruned network: {result['before'] - ours:.2f} points"])
    plain, again = max(v["accuracy"] for v in peer), max(v["recalibrated"] for v in peer)
    lines += [
        "",
        f"under the unpruned network: {result['before'] - ours:.2f} points",
        f"over the peer's best as it comes ({plain:.2f}): {ours - plain:.2f} points",
        f"over the peer's best with recalibration ({again:.2f}): {ours - again:.2f} points",
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True)
    parser.add_argument("--weights", required=True)
    parser.add_argument("--depth", type=int, default=56)
    parser.add_argument("--keep", type=float, default=0.5, help="share of the MACs that is left")
    parser.add_argument("--samples", type=int, default=2000, help="calibration images")
    parser.add_argument("--test", type=int, default=None, help="test images; all by default")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--all", action="store_true", help="also the ablations of actprune")
    parser.add_argument("--peer", nargs="*", choices=list(PEER), default=list(PEER), help="criteria of Torch-Pruning")
    parser.add_argument("--out", type=Path, default=None, help="JSON file")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    logging.basicConfig(level=logging.WARNING, stream=sys.stderr)
    result = measure(args)
    print("\n" + table(result))
    if args.out is not None:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
