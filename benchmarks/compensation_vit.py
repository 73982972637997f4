"""A small vision transformer is trained, loses half of all columns of its MLPs, and is not trained again.

    python benchmarks/compensation_vit.py [--data DIR] [--net FILE] [--seeds 0 1 2] [--out FILE]

Without --data the 8 x 8 digits of scikit-learn; with it CIFAR-10 (JPEG copy), DIR/train/CLASS/*.jpg and DIR/test/CLASS/*.jpg.
FILE of --net keeps the trained network for the next run. Heads and residual stream stay whole. Every row is the median over
calibration seeds (which training images are observed, and what drawn criteria draw).
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from finetuning import augmented
from images import decode, files
from provenance import commit
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F

from actprune import Budget, Pruner, Selection, criteria
from actprune.compensation import LeastSquares, Mean
from actprune.models.vit import ViTTiny
from actprune.pruning.batches import observe_pairs, pairs_of
from actprune.pruning.finishing import finish, has_finish
from actprune.pruning.verify import with_locks
from compensation import accuracy

BATCH = 250
KEEP = 0.5
ROWS = {
    "magnitude, cut plainly": (criteria.Magnitude, "uniform", lambda: None),
    "random, cut plainly": (criteria.Random, "uniform", lambda: None),
    "reconstruction, mean folded": (criteria.Reconstruction, "global", Mean),
    "random, least squares sequential": (criteria.Random, "uniform", LeastSquares),
    "magnitude, least squares sequential": (criteria.Magnitude, "uniform", LeastSquares),
    "reconstruction, least squares once": (criteria.Reconstruction, "global", lambda: LeastSquares(refit="once")),
    "reconstruction, least squares sequential": (criteria.Reconstruction, "global", LeastSquares),
}
FINAL = "reconstruction, least squares sequential"


@dataclass
class Task:
    """Images and classes, and the network for them."""

    name: str
    train: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]
    net: dict[str, int]
    epochs: int
    shifts: bool
    """Whether training images are mirrored and shifted."""


def digits() -> Task:
    x, y = (torch.as_tensor(part) for part in load_digits(return_X_y=True))
    x, y = (x.float() / 16 - 0.3).view(-1, 1, 8, 8), y.long()
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(0))
    held, rest = order[:450], order[450:]
    net = {"in_channels": 1, "image_size": 8, "patch_size": 2, "dim": 64, "depth": 3}
    return Task("digits", (x[rest], y[rest]), (x[held], y[held]), net, 60, shifts=False)


def cifar(folder: Path) -> Task:
    train, test = (decode(files(folder / part)) for part in ("train", "test"))
    return Task("CIFAR-10 (JPEG copy)", train, test, {"patch_size": 8, "dim": 64, "depth": 4}, 6, shifts=True)


def trained(task: Task, path: Path | None) -> nn.Module:
    """AdamW, weight decay 0.05, batches of 128, one cycle up to 2e-3 and down."""
    torch.manual_seed(0)
    model = ViTTiny(**task.net)
    if path is not None and path.exists():
        model.load_state_dict(torch.load(path, weights_only=True))
        return model.eval()
    x, y = task.train
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.05)
    steps = task.epochs * -(-len(y) // 128)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
    for epoch in range(task.epochs):
        for rows in torch.randperm(len(y), generator=generator).split(128):
            seen = augmented(x[rows], generator) if task.shifts else x[rows]
            loss = F.cross_entropy(model(seen), y[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        if task.shifts or epoch == task.epochs - 1:
            print(f"  epoch {epoch}: {accuracy(model, *task.test):.2f} %", flush=True)
            model.train()
    if path is not None:
        torch.save(model.state_dict(), path)
    return model.eval()


def columns_gone(model: nn.Module, row: str, x: Tensor, seed: int) -> nn.Module:
    """Half of all MLP columns leave; nothing else does."""
    criterion, scope, compensation = ROWS[row]
    how, original = compensation(), copy.deepcopy(model)
    pruner = Pruner(model, x[:1], criterion(), Budget(params=0.99), Selection(scope=scope), how, seed)
    mlps = [group for group in pruner.graph.unlocked if ".mlp." in group.name]
    others = {group.name: "the MLPs alone are cut" for group in pruner.graph.unlocked if group not in mlps}
    pruner.graph = with_locks(pruner.graph, others)
    half = pruner.graph.removed({group.name: range(round(group.size * (1 - KEEP))) for group in mlps})
    pruner.budget = Budget(params=pruner.graph.cost.evaluate("params", half) / pruner.params_before)
    pairs = list(pairs_of(x.split(BATCH), x[:1]))
    looks = how is not None or criterion().statistics()
    plan = pruner.plan(observe_pairs(pruner, pairs) if looks else None)
    assert plan is not None
    pruner.execute(plan)
    if has_finish(how):
        finish(model, original, pruner.graph, plan, [a for a, _ in pairs], how)
    left = sum(block.mlp[0].out_features for block in model.blocks)
    assert left <= KEEP * sum(block.mlp[0].out_features for block in original.blocks)
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=None)
    parser.add_argument("--net", type=Path, default=None)
    parser.add_argument("--samples", type=int, default=2000, help="calibration images; all of the digits' 1,347")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=None, help="JSON file")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    task = cifar(args.data) if args.data is not None else digits()
    began = time.process_time()
    model = trained(task, args.net)
    before = accuracy(model, *task.test)
    print(f"{task.name}: {before:.2f} % on {len(task.test[1]):,} test images; {time.process_time() - began:.0f} s of training")
    found: dict[str, list[float]] = {row: [] for row in ROWS}
    for seed in args.seeds:
        rows = torch.randperm(len(task.train[1]), generator=torch.Generator().manual_seed(seed))[: args.samples]
        for row in ROWS:
            pruned = columns_gone(copy.deepcopy(model), row, task.train[0][rows], seed)
            found[row].append(accuracy(pruned, *task.test))
            print(f"  {row:<44}seed {seed}  {found[row][-1]:.2f} %", flush=True)
    print(f"\nhalf of all MLP columns gone, median of seeds {', '.join(map(str, args.seeds))}; unpruned {before:.2f} %")
    for row, values in found.items():
        print(f"{row:<44}{statistics.median(values):>8.2f}")
    print(f"under the unpruned network: {before - statistics.median(found[FINAL]):.2f} points")
    if args.out is not None:
        result = {"data": task.name, "before": before, "seeds": args.seeds, "rows": found, "commit": commit()}
        args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
