"""Which models can be pruned as they are, with no configuration, how much of them, and how exactly; beside Torch-Pruning.

    python benchmarks/prunability.py torchvision torchvision-other timm transformers [--peer | --observed] [--out FILE]

Half of every group that may be cut leaves, drawn at random; before that, random plans with uneven shares are tried and taken
back. A model counts as pruned when the cut network runs forward and backward, in evaluation and in training mode, where the
whole one does, and a fresh copy takes its shape and values from the file. ``covered``: share of parameters in groups of at
least two units that may be cut. ``error``: largest difference to the full-size network whose removed slices are zero, over all
plans, relative to the largest output (where it exceeds 1e-5, once more in float64 behind a slash: a wrong cut stays wrong
there, rounding goes); norms, means, variances and extremes over channels are taken over the channels that stay there too
(``tests/masked.py``, ``reductions.py``);
``effect``: the same between that network and the whole one, so that a cut without consequences does not pass for an exact one.
``trace``: seconds to trace, and of one plain forward. The peer removes half of every layer that it finds; the last layer is
named to it, and its cuts are checked for running, not for being exact. Every attempt runs in a process of its own and is given
``--timeout`` seconds, ``--jobs`` of them side by side (the seconds are then those of a busy machine). Models that are already
in ``--out`` are not run again.

With ``--observed``: three batches are watched, and a fifth of the parameters leaves by entropy with means folded, then by RMS
with the readers refitted; what the network says afterwards is finite.
"""

from __future__ import annotations

import argparse
import functools
import json
import multiprocessing
import subprocess
import sys
import warnings
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from importlib.metadata import version
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "benchmarks"), str(ROOT / "tests")]

import sides  # noqa: E402
from zoos import COLLECTIONS  # noqa: E402

from actprune.core.files import atomic_path  # noqa: E402


def _child(pipe: Connection, side: str, build: Any, example: Any, plans: int, threads: int) -> None:
    """One attempt; a failure is a result."""
    torch.set_num_threads(threads)
    warnings.simplefilter("ignore")
    try:
        result = getattr(sides, side)(build, example, plans)
    except Exception as error:
        first = (str(error).strip().splitlines() or [""])[0]
        result = {"prunes": False, "failure": f"{type(error).__name__}: {first}"}
    pipe.send(result)


@functools.cache
def entries(collection: str) -> dict[str, tuple[Any, Any]]:
    """Name -> how to build the model and what to call it with."""
    return {name: (build, example) for name, build, example in COLLECTIONS[collection]()}


def attempt(collection: str, name: str, side: str, args: argparse.Namespace) -> dict[str, Any]:
    """Run one side in a process of its own, within the time it is given."""
    build, example = entries(collection)[name]
    context = multiprocessing.get_context("fork")
    mine, theirs = context.Pipe()
    child = context.Process(target=_child, args=(theirs, side, build, example, args.plans, args.threads))
    child.start()
    theirs.close()
    try:
        if mine.poll(args.timeout):
            return mine.recv()
        return {"prunes": False, "failure": f"not done after {args.timeout} s"}
    except EOFError:
        return {"prunes": False, "failure": "the process died"}
    finally:
        child.kill()
        child.join()


def attempts(
    collection: str, wanted: list[tuple[str, str]], args: argparse.Namespace
) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Model, side and result, as attempts end."""
    if args.jobs == 1:
        for name, side in wanted:
            yield name, side, attempt(collection, name, side, args)
        return
    with ProcessPoolExecutor(args.jobs, multiprocessing.get_context("fork")) as pool:
        running = {pool.submit(attempt, collection, name, side, args): (name, side) for name, side in wanted}
        for done in as_completed(running):
            yield *running[done], done.result()


def _error(row: dict[str, Any]) -> str:
    """The error, in float64 as well where that was asked."""
    if "error" not in row:
        return "-"
    precise = row.get("error64")
    return f"{row['error']:.0e}" + ("" if precise is None else f"/{precise:.0e}")


def table(collection: str, rows: dict[str, Any]) -> Table:
    """One line per model."""
    shown = Table(
        "model", "pruned", "covered", "error", "effect", "trace s", "forward s", "observed", "peer", "cause", title=collection
    )
    said = {True: "yes", False: "no", None: "-"}
    for name, row in rows.items():
        mine = row.get("ours", {})
        shown.add_row(
            name,
            said[mine.get("prunes")],
            f"{mine['covered']:.3f}" if "covered" in mine else "-",
            _error(mine),
            f"{mine['effect']:.0e}" if "effect" in mine else "-",
            f"{mine['trace_seconds']:.2f}" if "trace_seconds" in mine else "-",
            f"{mine['forward_seconds']:.2f}" if "forward_seconds" in mine else "-",
            said[row.get("observed", {}).get("prunes")],
            said[row.get("peer", {}).get("prunes")],
            next((row[side]["failure"] for side in ("ours", "observed") if row.get(side, {}).get("failure")), ""),
        )
    return shown


def summary(collection: str, rows: dict[str, Any]) -> str:
    """Counts, coverage, the largest error and the models that trace slowly."""
    ran = {side: [row[side] for row in rows.values() if side in row] for side in ("ours", "peer", "observed")}
    done = ran["ours"]
    names = {"ours": "pruned", "peer": "by Torch-Pruning", "observed": "by what was observed"}
    text = f"{collection}: " + ", ".join(
        f"{sum(r['prunes'] for r in results)} of {len(results)} {names[side]}" for side, results in ran.items() if results
    )
    full = [r for r in done if "covered" in r]
    if not full:
        return text
    covered, exact = [r["covered"] for r in full], sum(r["error"] <= sides.EXACT for r in full)
    precise = [r["error64"] for r in full if r.get("error64") is not None]
    slow = sum(r["trace_seconds"] > max(2.0, 2 * r["forward_seconds"]) for r in full)
    idle = sum(r["effect"] < 1e-3 for r in full)
    off = sum(r["count_off"] > 0 for r in full)
    untrained = sum(not r["trains"] for r in full)
    return (
        f"{text}; covered {min(covered):.3f} at least, {sum(covered) / len(covered):.3f} on average; error within "
        f"1e-5 for {exact} of {len(full)}, for {len(precise)} more {max(precise, default=0.0):.0e} in float64; "
        f"without effect: {idle}; counts off: {off}; fail at a backward, whole or cut: {untrained}; "
        f"traces slower than two forwards and 2 s: {slow}"
    )


def main() -> None:
    """Run the collections; print a table, the reason of every lock and one summary line each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("collections", nargs="*", choices=[*COLLECTIONS, []], help=", ".join(COLLECTIONS))
    parser.add_argument("--peer", action="store_true", help="run Torch-Pruning beside")
    parser.add_argument("--observed", action="store_true", help="prune by what was observed instead")
    parser.add_argument("--only", default="", help="models whose name contains this")
    parser.add_argument("--plans", type=int, default=3, help="random plans beside the half of everything")
    parser.add_argument("--timeout", type=float, default=900, help="seconds for one model on one side")
    parser.add_argument("--jobs", type=int, default=1, help="attempts side by side")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "prunability.json")
    args = parser.parse_args()
    console = Console(width=120)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    results: dict[str, Any] = json.loads(args.out.read_text()) if args.out.exists() else {}
    packages = ("torch", "torchvision", "timm", "transformers", "torch-pruning")
    results["versions"] = {package: version(package) for package in packages}
    results["commit"] = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False
    ).stdout.strip()
    results["seed"] = 0
    sides_run = ("observed",) if args.observed else ("ours", "peer") if args.peer else ("ours",)
    for collection in args.collections or COLLECTIONS:
        rows = results.setdefault(collection, {})
        wanted = [(name, side) for name in entries(collection) if args.only in name for side in sides_run]
        missing = [(name, side) for name, side in wanted if side not in rows.get(name, {})]
        for name, side, result in attempts(collection, missing, args):
            rows.setdefault(name, {})[side] = result
            print(f"{collection} {name}, {side}: {result.get('failure') or 'ok'}", file=sys.stderr, flush=True)
            with atomic_path(args.out) as path:
                path.write_text(json.dumps(results, indent=1))
        ordered = {name: rows[name] for name in entries(collection) if name in rows}
        console.print(table(collection, ordered))
        for name, row in ordered.items():
            for reason, groups in row.get("ours", {}).get("locks", {}).items():
                console.print(f"{name}: {groups} locked, {reason}", soft_wrap=True, highlight=False)
        console.print(summary(collection, ordered), soft_wrap=True, highlight=False)


if __name__ == "__main__":
    main()
