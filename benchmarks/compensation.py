"""Accuracy after post-training pruning, against Torch-Pruning, at equal MACs on the same data, with no gradient step.

    python benchmarks/compensation.py --data DIR --weights DIR [--depth 56] [--keep 0.5] [--epochs 1] [--out FILE]

DIR of data holds train/CLASS/*.jpg and test/CLASS/*.jpg (CIFAR-10, JPEG copy); DIR of weights holds resnetDEPTH-jpeg.th.
Every row is the median over calibration seeds: which training images are observed, and what drawn criteria draw. The peer
prunes the inner channels of every block, for its cut of the residual stream does not run with parameter-free shortcuts;
its ratio is bisected until its MACs are the largest that do not exceed the target. Both sides are counted by
``actprune.trace``. "recalibrated" is the same cut with batch-norm statistics recomputed on the same calibration images,
"trained" the same cut after ``--epochs`` on ``--images`` training images (recipe: finetuning.py). Cuts are made on the CPU;
``--device`` is where networks are trained and evaluated. FILE keeps every row as
soon as it is measured, and a run that was broken off goes on; rows that cut the same network share one measurement.
"""

from __future__ import annotations

import argparse
import copy
import functools
import hashlib
import importlib.metadata
import json
import logging
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch_pruning as tp
from finetuning import train
from images import decode, files, sample
from provenance import commit
from torch import Tensor, nn
from torch.nn import functional as F

import actprune
from actprune import Budget, Selection, criteria
from actprune.compensation import LeastSquares, Mean, recalibrate
from actprune.core.files import atomic_path
from actprune.models.resnet import CifarResNet

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
SCOPES = ("uniform", "global")
COLUMNS = ("accuracy", "recalibrated", "trained")


# --- network ---


def placed(data: tuple[Tensor, Tensor], device: str) -> tuple[Tensor, Tensor]:
    return data[0].to(device), data[1].to(device)


@torch.no_grad()
def accuracy(model: nn.Module, x: Tensor, y: Tensor) -> float:
    model.eval()
    right = sum(int((model(a).argmax(1) == b).sum()) for a, b in zip(x.split(BATCH), y.split(BATCH), strict=True))
    return 100 * right / len(y)


# --- the two sides ---


def macs_of(model: nn.Module) -> int:
    return actprune.trace(model, torch.zeros(1, 3, 32, 32)).macs


def peer_cut(name: str, everywhere: bool, model: nn.Module, x: Tensor, y: Tensor, seed: int, target: float) -> nn.Module:
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
    recalibrate(model, list(x.split(BATCH)))
    return model


def our_cut(name: str, keep: float, model: nn.Module, x: Tensor, y: Tensor, seed: int, target: float) -> nn.Module:
    criterion, scope, how = OURS[name]
    actprune.prune(
        model,
        x[:1],
        x.split(BATCH),
        criterion=criterion(),
        budget=Budget(macs=keep),
        selection=Selection(scope=scope),
        compensation=how(),
        seed=seed,
    )
    return model


# --- the table ---


class Rows:
    """Row -> seed -> what was measured; kept in a file after every change.

    Raises:
        SystemExit: the file was written with other settings.
    """

    def __init__(self, path: Path | None, settings: dict) -> None:
        self.path, self.settings = path, settings
        self.found: dict[str, dict[str, dict[str, float]]] = {}
        if path is not None and path.exists():
            kept = json.loads(path.read_text())
            if kept["settings"] != settings:
                raise SystemExit(f"{path} was measured with {kept['settings']}, not with {settings}; give another --out")
            self.found = kept["rows"]

    def get(self, row: str, seed: int) -> dict[str, float] | None:
        return self.found.get(row, {}).get(str(seed))

    def put(self, row: str, seed: int, values: dict[str, float]) -> None:
        self.found.setdefault(row, {})[str(seed)] = values
        print(f"  {row:<52} seed {seed}  " + "  ".join(f"{key} {value:.2f}" for key, value in values.items()), flush=True)
        self.write()

    def write(self, **more: object) -> None:
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with atomic_path(self.path) as temporary:
                temporary.write_text(json.dumps({"settings": self.settings, "rows": self.found, **more}, indent=1) + "\n")

    def medians(self, seeds: list[int]) -> dict[str, dict[str, float]]:
        """Of rows that have every seed."""
        whole = {row: [by_seed[str(seed)] for seed in seeds] for row, by_seed in self.found.items() if _has(by_seed, seeds)}
        return {row: {key: statistics.median(one[key] for one in found) for key in found[0]} for row, found in whole.items()}


def _has(by_seed: dict[str, dict[str, float]], seeds: list[int]) -> bool:
    return all(str(seed) in by_seed for seed in seeds)


def wanted(args: argparse.Namespace) -> list[tuple[str, Callable]]:
    """Every row with how to cut: (model, calibration images, labels, seed, MACs that may be left) -> network."""
    rows = []
    for name in OURS if args.all else [FINAL]:
        rows.append((f"actprune: {name}", functools.partial(our_cut, name, args.keep)))
    for name in args.peer:
        for scope in SCOPES:
            rows.append((f"torch-pruning: {name}, {scope}", functools.partial(peer_cut, name, scope == "global")))
    only = args.rows or [row for row, _ in rows]
    return [(row, cut) for row, cut in rows if any(part in row for part in only)]


def copied(model: nn.Module, device: str) -> nn.Module:
    return copy.deepcopy(model).to(device)


def measure(args: argparse.Namespace) -> tuple[Rows, float]:
    """Every row for every seed that is not measured yet, and the accuracy of the unpruned network."""
    model = CifarResNet(args.depth, weights=str(Path(args.weights) / f"resnet{args.depth}-jpeg.th")).eval()
    train_files, test_files = files(Path(args.data) / "train"), files(Path(args.data) / "test")
    test = placed(decode(sample(test_files, args.test, 0)), args.device)
    settings = {
        **{name: getattr(args, name) for name in ("depth", "keep", "samples", "test", "epochs", "images", "device")},
        "versions": {name: importlib.metadata.version(name) for name in ("torch", "torch-pruning")},
    }
    rows, whole = Rows(args.out, settings), macs_of(model)
    before = accuracy(copied(model, args.device), *test)
    print(f"ResNet-{args.depth}: {before:.2f} % on {len(test[1]):,} test images, {whole:,} MACs", flush=True)
    everything = placed(decode(sample(train_files, args.images, 0)), args.device) if args.epochs else None
    known: dict[tuple[str, int | None, str], float] = {}

    def scored(state: str, seed: int | None, kind: str, make: Callable[[], nn.Module]) -> float:
        """The accuracy of what ``make`` returns; once for rows that cut the same network."""
        if (state, seed, kind) not in known:
            known[state, seed, kind] = accuracy(make(), *test)
        return known[state, seed, kind]

    for seed in args.seeds:
        x, y = decode(sample(train_files, args.samples, seed))
        for row, cut in wanted(args):
            if rows.get(row, seed) is not None:
                continue
            began = time.process_time()
            pruned = cut(copy.deepcopy(model), x, y, seed, args.keep * whole)
            values = {"seconds": time.process_time() - began, "macs": macs_of(pruned) / whole}
            state = digest(pruned)
            values["accuracy"] = scored(state, None, "plain", lambda: copied(pruned, args.device))  # noqa: B023
            if row.startswith("torch-pruning"):
                values["recalibrated"] = scored(
                    state,
                    seed,
                    "recalibrated",
                    lambda: recalibrated(copied(pruned, args.device), x.to(args.device)),  # noqa: B023
                )
            if everything is not None:
                values["trained"] = scored(
                    state,
                    seed,
                    "trained",
                    lambda: train(copied(pruned, args.device), *everything, epochs=args.epochs, seed=seed),  # noqa: B023
                )
            rows.put(row, seed, values)
    rows.write(before=before, medians=rows.medians(args.seeds), commit=commit(), python=platform.python_version())
    return rows, before


def digest(model: nn.Module) -> str:
    """The same for networks with the same tensors."""
    found = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        found.update(name.encode() + str(tuple(tensor.shape)).encode() + tensor.contiguous().numpy().tobytes())
    return found.hexdigest()


def table(args: argparse.Namespace, medians: dict[str, dict[str, float]], before: float) -> str:
    lines = [
        f"ResNet-{args.depth} / CIFAR-10 (JPEG copy), MACs left {args.keep:.0%}, unpruned {before:.2f} %,",
        f"{args.samples:,} calibration and {args.test or 10_000:,} test images, no gradient step before the last column,",
        f"median of seeds {', '.join(map(str, args.seeds))}",
        "",
        f"{'':<52}{'MACs':>9}" + "".join(f"{column:>15}" for column in COLUMNS),
    ]
    for row, values in sorted(medians.items(), key=lambda item: -item[1]["accuracy"]):
        shown = [f"{values[column]:.2f}" if column in values else "" for column in COLUMNS]
        lines.append(f"{row:<52}{values['macs']:>9.1%}" + "".join(f"{text:>15}" for text in shown))
    ours = medians.get(f"actprune: {FINAL}")
    peer = [values for row, values in medians.items() if row.startswith("torch-pruning")]
    if ours is None:
        return "\n".join(lines)
    lines += ["", f"under the unpruned network: {before - ours['accuracy']:.2f} points"]
    for column in COLUMNS:
        found = [values[column] for values in peer if column in values]
        if found:
            mine = ours.get(column, ours["accuracy"])
            lines.append(f"over the peer's best, {column} ({max(found):.2f}): {mine - max(found):.2f} points")
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
    parser.add_argument("--epochs", type=int, default=0, help="of training after the cut, for both sides")
    parser.add_argument("--images", type=int, default=None, help="training images of an epoch; all by default")
    parser.add_argument("--device", default="cpu", help="where networks are trained and evaluated")
    parser.add_argument("--all", action="store_true", help="also the ablations of actprune")
    parser.add_argument("--peer", nargs="*", choices=list(PEER), default=list(PEER), help="criteria of Torch-Pruning")
    parser.add_argument("--rows", nargs="*", default=None, help="only rows whose name has one of these in it")
    parser.add_argument("--out", type=Path, default=None, help="JSON file")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    logging.basicConfig(level=logging.WARNING, stream=sys.stderr)
    rows, before = measure(args)
    print("\n" + table(args, rows.medians(args.seeds), before))


if __name__ == "__main__":
    main()
