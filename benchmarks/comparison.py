"""Sparsity while training: by statistics, proximal, SeReNe and chance, on one network, data and number of epochs.

    python benchmarks/comparison.py digits [--out FILE]
    python benchmarks/comparison.py resnet20 --data DIR --weights FILE [--device cuda --jobs 12] [--out FILE]

``digits``: scikit-learn's digits, the small network and recipe of the default configuration, from scratch. ``resnet20``:
CIFAR-10 (JPEG copy), DIR with train/CLASS/*.jpg and test/CLASS/*.jpg; every method starts from the same trained weights, FILE
(resnet20-jpeg.th). They have seen all training images, also the tenth that is held out here: validation loss and accuracy are
too good, for all methods alike; nothing but the test images is reported.

Every row: mean and standard deviation over seeds of the test accuracy after the LAST epoch, parameters and MACs left, and the
median time of an epoch with its validation and pruning. A method's strength is the share of parameters to leave (entropy,
rademacher, random), ``lam`` of group lasso (prox) or group MCP (mcp; units that became zero are removed), or SeReNe's
``tolerance``: how much a pruning stage may cost of the validation loss. The last three do not set the size, so each has
several. On ``resnet20`` they are done after 60 % of the epochs, as the statistics are; the rest is training without a penalty.
FILE keeps every run as soon as it is done; a command that was broken off goes on.
"""

from __future__ import annotations

import argparse
import io
import json
import logging
import multiprocessing
import statistics
import tempfile
import time
import warnings
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import redirect_stdout
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from comparison_settings import METHODS, SETTINGS, Data
from images import Batches
from lightning import Callback, Trainer, seed_everything
from provenance import commit, versions
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR

from actprune import trace
from actprune.core.files import atomic_path
from actprune.training import ClassificationTask, SeReNe

EVALUATED = 500


class Clock(Callback):
    """Seconds of every epoch with its validation and, as the first of the callbacks, with what pruning adds."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_train_epoch_start(self, trainer: Trainer, pl_module: Any) -> None:
        self.began = _now()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: Any) -> None:
        self.seconds.append(_now() - self.began)


def _now() -> float:
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return time.perf_counter()


# --- runs ---

_DATA: Data = {}  # of this process, on its device


def prepare(path: Path | None, device: str, threads: int) -> None:
    """Once per process: quiet, and the data where the network will be."""
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.set_num_threads(threads)
    if path is not None:
        _DATA.update({name: (x.to(device), y.to(device)) for name, (x, y) in torch.load(path).items()})


def run(args: argparse.Namespace, method: str, strength: float, seed: int) -> dict[str, Any]:
    """Train once; what is left and how good it is after the last epoch."""
    setting = SETTINGS[args.setting]
    if args.decay is not None:
        setting = replace(setting, serene={**setting.serene, "decay": args.decay})
    seed_everything(seed, verbose=False)
    optimizer, pruning = METHODS[method](setting, strength, args.epochs)
    clock = Clock()
    task = ClassificationTask(setting.network(args), optimizer, 10, partial(CosineAnnealingLR, T_max=args.epochs))
    trainer = Trainer(
        max_epochs=args.epochs,
        accelerator="gpu" if args.device == "cuda" else "cpu",
        devices=1,
        callbacks=[clock] if pruning is None else [clock, pruning],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    train = Batches(*_DATA["train"], args.batch, seed, **setting.augment)
    before = sizes(task.net)
    with redirect_stdout(io.StringIO()):
        trainer.fit(task, train, Batches(*_DATA["val"], EVALUATED))
        trainer.test(task, Batches(*_DATA["test"], EVALUATED), verbose=False)
    return {
        "accuracy": 100 * float(trainer.callback_metrics["test/accuracy"]),
        **sizes(task.net),
        **{f"{name}_before": value for name, value in before.items()},
        "seconds": statistics.median(clock.seconds),
        "history": [] if pruning is None else pruning.history,
        **({"stages": pruning.stages} if isinstance(pruning, SeReNe) else {}),
    }


def sizes(net: nn.Module) -> dict[str, int]:
    x = _DATA["test"][0][:1]
    graph = trace(net.to(x.device), x)
    return {"params": graph.params, "macs": graph.macs}


def wanted(args: argparse.Namespace) -> Iterator[tuple[str, float, int]]:
    """Slow methods first, so that no process ends long after the others."""
    for method in reversed(args.methods):
        for strength in args.strengths[method]:
            for seed in args.seeds:
                yield method, strength, seed


def measure(args: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Every run that is not in the file yet; "method strength seed" -> what it found."""
    config = {name: getattr(args, name) for name in ("setting", "epochs", "batch", "images", "device")}
    config.update({} if args.decay is None else {"decay": args.decay})
    found: dict[str, dict[str, Any]] = {}
    if args.out is not None and args.out.exists():
        kept = json.loads(args.out.read_text())
        if kept["config"] != config:
            raise SystemExit(f"{args.out} was measured with {kept['config']}, not with {config}; give another --out")
        found = kept["runs"]
    about = {
        "config": config,
        "jobs": args.jobs,
        "device": torch.cuda.get_device_name() if args.device == "cuda" else "cpu",
        "versions": versions("torch", "lightning", "actprune"),
        "commit": commit(),
    }
    left = [one for one in wanted(args) if key(*one) not in found]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "data.pt"
        if left:
            torch.save(SETTINGS[args.setting].data(args), path)
        for one, values in results(args, left, path):
            found[key(*one)] = values
            print(f"  {key(*one):<32}{line(values)}", flush=True)
            if args.out is not None:
                args.out.parent.mkdir(parents=True, exist_ok=True)
                with atomic_path(args.out) as temporary:
                    temporary.write_text(json.dumps({**about, "runs": found}, indent=1) + "\n")
    return found


def results(args: argparse.Namespace, left: list[tuple[str, float, int]], path: Path) -> Iterator[tuple[Any, dict[str, Any]]]:
    """One after another here, or side by side in processes."""
    if args.jobs == 1:
        prepare(path if left else None, args.device, args.threads)
        yield from ((one, run(args, *one)) for one in left)
        return
    how = {"initializer": prepare, "initargs": (path, args.device, args.threads)}
    with ProcessPoolExecutor(min(args.jobs, len(left) or 1), multiprocessing.get_context("spawn"), **how) as pool:
        tasks = {pool.submit(run, args, *one): one for one in left}
        for task in as_completed(tasks):
            yield tasks[task], task.result()


# --- the table ---


def key(method: str, strength: float, seed: int) -> str:
    return f"{method} {strength:g} {seed}"


def line(values: dict[str, Any]) -> str:
    return f"{values['accuracy']:6.2f} %  {values['params']:>8,} parameters  {values['seconds']:.2f} s per epoch"


def table(args: argparse.Namespace, found: dict[str, dict[str, Any]]) -> str:
    about = f"{args.epochs} epochs, seeds {', '.join(map(str, args.seeds))}, {args.device}, {args.jobs} side by side"
    lines = [
        f"{args.setting}: {about}; mean ± standard deviation, last epoch",
        "",
        "| method | strength | parameters left, % | MACs left, % | test accuracy, % | s per epoch |",
        "|---|---|---|---|---|---|",
    ]
    for method in args.methods:
        for strength in args.strengths[method]:
            runs = [found[key(method, strength, seed)] for seed in args.seeds]
            shares = [[100 * one[name] / one[f"{name}_before"] for one in runs] for name in ("params", "macs")]
            cells = [spread(share, 1) for share in shares] + [spread([one["accuracy"] for one in runs], 2)]
            seconds = statistics.median(one["seconds"] for one in runs)
            lines.append(f"| {method} | {strength:g} | {' | '.join(cells)} | {seconds:.2f} |")
    return "\n".join(lines)


def spread(values: list[float], places: int) -> str:
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.mean(values):.{places}f} ± {deviation:.{places}f}"


def strength_of(text: str) -> tuple[str, tuple[float, ...]]:
    method, _, values = text.partition("=")
    if method not in METHODS:
        raise argparse.ArgumentTypeError(f"{method!r} is no method; choose from {', '.join(METHODS)}, as in prox=0.001,0.01")
    return method, tuple(float(value) for value in values.split(","))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("setting", nargs="?", choices=SETTINGS, default="digits")
    parser.add_argument("--data", type=Path, help="resnet20: folder of images")
    parser.add_argument("--weights", type=Path, help="resnet20: trained weights to start from")
    parser.add_argument("--methods", nargs="+", choices=METHODS, help="all that the setting has strengths for")
    parser.add_argument("--strengths", nargs="+", type=strength_of, default=[], help="as in prox=0.001,0.01")
    parser.add_argument("--decay", type=float, help="of SeReNe, instead of the setting's; 0: what its threshold does alone")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--epochs", type=int)
    parser.add_argument("--batch", type=int)
    parser.add_argument("--images", type=int, help="resnet20: of the training and of the test part, at most")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    parser.add_argument("--jobs", type=int, default=1, help="runs side by side")
    parser.add_argument("--threads", type=int, default=1, help="of each of them")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    if args.setting == "resnet20" and None in (args.data, args.weights):
        parser.error("resnet20 needs --data and --weights")
    setting = SETTINGS[args.setting]
    args.strengths = {**setting.strengths, **dict(args.strengths)}
    args.methods = args.methods or list(setting.strengths)
    if absent := [method for method in args.methods if method not in args.strengths]:
        parser.error(f"{args.setting} has no strengths for {', '.join(absent)}; give --strengths {absent[0]}=...")
    args.epochs, args.batch = args.epochs or setting.epochs, args.batch or setting.batch
    if args.device == "auto":
        args.device = "cuda" if torch.cuda.is_available() else "cpu"
    print(table(args, measure(args)))


if __name__ == "__main__":
    main()
