"""Which models can be pruned as they are, with no configuration, how much of them, and how exactly; beside Torch-Pruning.

    python benchmarks/prunability.py torchvision timm transformers [--peer] [--out runs/prunability.json]

Half of every group that may be cut leaves, drawn at random. A model counts as pruned when the cut network runs forward and
backward, in evaluation and in training mode, and a fresh copy takes its shape and values from the file. ``covered`` is the
share of parameters of which some dimension may be cut. ``error`` is the largest difference to the full-size network whose
removed slices are zero, relative to the largest output ("-" where the network has norms of its own that the reference does
not know). The peer removes half of every layer it finds; the class layer is named to it.
"""

from __future__ import annotations

import argparse
import copy
import json
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

import actprune
from actprune.core.calling import call
from actprune.core.files import atomic_path
from actprune.pruning.plans import draft

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "benchmarks"), str(ROOT / "tests")]

from zoos import COLLECTIONS  # noqa: E402

from masked import difference, masked, outputs  # noqa: E402


def floats(output: Any) -> list[Tensor]:
    """Floating-point tensors of an output that a loss could be made of."""
    leaves = tree_leaves(output if isinstance(output, (Tensor, tuple, list, dict)) else vars(output))
    return [x for x in leaves if isinstance(x, Tensor) and x.is_floating_point() and x.requires_grad]


def works(model: nn.Module, example: Any) -> None:
    """Forward and backward, in evaluation and in training mode; detectors train on targets only, so they are evaluated."""
    for training in (False, True):
        detector = isinstance(example, list)
        if training and detector:
            continue
        model.train(training)
        double = tree_map_only(Tensor, lambda x: torch.cat([x, x]), example) if training and not detector else example
        found = floats(call(model, double))
        if found:
            sum(x.sum() for x in found).backward()
            model.zero_grad()


def ours(name: str, build: Any, example: Any) -> dict[str, Any]:
    """Prune one model with actprune and check what came out."""
    torch.manual_seed(0)
    model = build()
    size = sum(p.numel() for p in model.parameters())
    fresh, full = copy.deepcopy(model), copy.deepcopy(model).eval()
    model.eval()
    with torch.no_grad():
        call(model, example)
        start = time.perf_counter()
        call(model, example)
        forward = time.perf_counter() - start
    start = time.perf_counter()
    actprune.trace(model, example)
    traced = time.perf_counter() - start
    pruner = actprune.Pruner(model, example, actprune.criteria.Random(), actprune.Budget(params=1.0), compensation=None)
    cuttable = {tensor for group in pruner.graph.unlocked for tensor, _ in group.members}
    covered = sum(p.numel() for n, p in model.named_parameters() if n in cuttable) / size
    units = {g.name: torch.randperm(g.size)[: g.size // 2].tolist() for g in pruner.graph.unlocked}
    plan = draft(model, pruner.graph, units)
    pruner.execute(plan)
    error = None
    own_norms = any(
        "norm" in type(m).__name__.lower() and not type(m).__module__.startswith("torch.nn") for m in full.modules()
    )
    if not own_norms and not isinstance(example, list):
        error = difference(outputs(model, example), outputs(masked(full, plan), example))
    works(model, example)
    with tempfile.TemporaryDirectory() as folder:
        actprune.save_pruned(model, Path(folder) / "pruned.pt")
        actprune.load_pruned(fresh, Path(folder) / "pruned.pt")
    again = difference(outputs(fresh, example), outputs(model, example)) if not isinstance(example, list) else 0.0
    locked = {g.name: g.locked for g in pruner.graph.groups if g.locked is not None and g.size > 1}
    return {
        "prunes": again == 0.0,
        "covered": covered,
        "error": error,
        "left": pruner.params / size,
        "forward_seconds": forward,
        "trace_seconds": traced,
        "locked": locked,
    }


def peer(name: str, build: Any, example: Any) -> dict[str, Any]:
    """Prune one model with Torch-Pruning as it comes."""
    import torch_pruning as tp

    torch.manual_seed(0)
    model = build().eval()
    size = sum(p.numel() for p in model.parameters())
    last = [m for m in model.modules() if isinstance(m, (nn.Linear, nn.Conv2d))][-1:]
    pruner = tp.pruner.MetaPruner(
        model, example, importance=tp.importance.MagnitudeImportance(), pruning_ratio=0.5, ignored_layers=last
    )
    pruner.step()
    works(model, example)
    left = sum(p.numel() for p in model.parameters()) / size
    return {"prunes": left < 1, "left": left}


@contextmanager
def quietly() -> Iterator[None]:
    """Models of other people warn about themselves."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def attempt(function: Any, name: str, build: Any, example: Any) -> dict[str, Any]:
    """Run one side; a failure is a result."""
    try:
        with quietly():
            return function(name, build, example)
    except Exception as error:
        return {"prunes": False, "failure": f"{type(error).__name__}: {str(error).strip().splitlines()[:1]}"}


def main() -> None:
    """Run the collections and print one table and one summary line each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("collections", nargs="+", choices=COLLECTIONS)
    parser.add_argument("--peer", action="store_true", help="run Torch-Pruning beside")
    parser.add_argument("--only", help="models whose name contains this")
    parser.add_argument("--out", type=Path, default=Path("runs/prunability.json"))
    args = parser.parse_args()
    console = Console(width=100)
    results: dict[str, Any] = {"versions": {p: version(p) for p in ("torch", "torchvision", "timm", "transformers")}}
    results["commit"] = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False
    ).stdout.strip()
    for collection in args.collections:
        table = Table("model", "pruned", "covered", "error", "trace / forward s", "peer", "cause", title=collection)
        rows = results[collection] = {}
        for name, build, example in COLLECTIONS[collection]():
            if args.only and args.only not in name:
                continue
            row = {"ours": attempt(ours, name, build, example)}
            if args.peer:
                row["peer"] = attempt(peer, name, build, example)
            rows[name] = row
            mine = row["ours"]
            table.add_row(
                name,
                "yes" if mine["prunes"] else "no",
                f"{mine['covered']:.3f}" if "covered" in mine else "-",
                f"{mine['error']:.0e}" if mine.get("error") is not None else "-",
                f"{mine['trace_seconds']:.1f} / {mine['forward_seconds']:.1f}" if "trace_seconds" in mine else "-",
                {True: "yes", False: "no", None: "-"}[row.get("peer", {}).get("prunes")],
                mine.get("failure", ""),
            )
            print(f"{collection} {name}: {mine.get('failure') or 'ok'}", file=sys.stderr, flush=True)
            with atomic_path(args.out) as path:
                path.write_text(json.dumps(results, indent=1))
        console.print(table)
        done = [row["ours"] for row in rows.values()]
        console.print(f"{collection}: {sum(r['prunes'] for r in done)} of {len(done)} pruned", end="")
        if args.peer:
            console.print(f", Torch-Pruning {sum(r['peer']['prunes'] for r in rows.values())}", end="")
        covered = [r["covered"] for r in done if "covered" in r]
        console.print(f"; covered {min(covered):.3f} at least, {sum(covered) / len(covered):.3f} on average")


if __name__ == "__main__":
    main()
