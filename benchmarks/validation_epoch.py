"""What observing adds to a validation epoch of a Trainer, with ``PruningCallback`` as it comes.

    python benchmarks/validation_epoch.py [--device cuda] [--images 25600] [--repeats 5] [--threads 2] [--only CRITERION ...]

ResNet-56 on CIFAR-10-sized inputs (noise, which is enough for times) that lie in memory, batches of 256, loss and accuracy
logged. A step is due after every second epoch, so that epochs are observed and plain in turns; the ratio is the median of the
observed ones over that of the plain ones, from ``on_validation_start`` until everything is counted, planning and cutting aside,
waited for on a GPU. The first two epochs and the first observed one are left out: there the network is traced and, on a GPU,
kernels are compiled. Of training there is one batch per epoch. Steps are small; the network hardly shrinks. Bars on a CPU:
entropy 1.10, Rademacher complexity 1.15, zero rate, variance and RMS 1.05; on a GPU 1.05 for each. ``overhead.py`` measures the
same around a bare forward.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import logging
import platform
import statistics
import time
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from lightning import Callback, LightningModule, Trainer, seed_everything
from overhead import ALONE, BATCH, keep_memory
from provenance import commit
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.classification import MulticlassAccuracy

from actprune import Budget, Schedule
from actprune.models.resnet import CifarResNet
from actprune.training import PruningCallback

MADE: dict[str, Any] = {name: (ALONE[name], None) for name in ("zero_rate", "variance", "rms", "rademacher", "entropy")}
MADE["entropy, mean compensation"] = (ALONE["entropy"], "mean")


class Task(LightningModule):
    """A classifier as everybody writes it."""

    def __init__(self) -> None:
        super().__init__()
        self.net, self.accuracy = CifarResNet(56), MulticlassAccuracy(10)

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        outputs = self.net(batch[0])
        self.accuracy(outputs, batch[1])
        self.log("val_loss", F.cross_entropy(outputs, batch[1]))
        self.log("val_acc", self.accuracy)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 1e-3)


class Clock(Callback):
    """Seconds of every validation epoch, and whether it was observed."""

    def __init__(self, pruning: PruningCallback, on_gpu: bool) -> None:
        self.pruning, self.on_gpu = pruning, on_gpu
        self.began, self.rows = 0.0, []

    def now(self) -> float:
        if self.on_gpu:
            torch.cuda.synchronize()
        return time.perf_counter()

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.began = self.now()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.sanity_checking:
            self.rows.append((self.now() - self.began, self.pruning._observer is not None))


def epochs(name: str, args: argparse.Namespace) -> tuple[list[float], list[float]]:
    """Seconds of plain and of observed epochs."""
    make, compensation = MADE[name]
    seed_everything(0, verbose=False)
    on_gpu = args.device == "cuda"
    data = TensorDataset(torch.randn(args.images, 3, 32, 32), torch.randint(0, 10, (args.images,)))
    schedule = Schedule("linear", start=3, interval=2, steps=args.repeats + 1)
    pruning = PruningCallback(make(), Budget(params=0.98), schedule, compensation=compensation)
    clock = Clock(pruning, on_gpu)
    trainer = Trainer(accelerator="gpu" if on_gpu else "cpu", devices=1, max_epochs=5 + 2 * args.repeats, limit_train_batches=1,
                      callbacks=[clock, pruning], logger=False, enable_checkpointing=False, enable_progress_bar=False,
                      enable_model_summary=False)  # fmt: skip
    loader = partial(DataLoader, data, BATCH, pin_memory=on_gpu)
    trainer.fit(Task(), loader(), loader())
    rows = clock.rows[2:]
    return [s for s, observed in rows if not observed], [s for s, observed in rows if observed][1:]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--images", type=int, default=25600)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--only", nargs="*", default=list(MADE), choices=list(MADE))
    parser.add_argument("--out", type=Path, default=None, help="JSON file")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    keep_memory()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    logging.getLogger("actprune").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning")
    device = torch.cuda.get_device_name() if args.device == "cuda" else f"{args.threads} threads"
    print(f"ResNet-56, {args.images:,} images in batches of {BATCH}, {device}: seconds of an epoch, medians of {args.repeats}")
    rows = {}
    for name in args.only:
        plain, observed = epochs(name, args)
        ratio = statistics.median(observed) / statistics.median(plain)
        rows[name] = {"plain": plain, "observed": observed, "ratio": ratio}
        spread = " ".join(f"{seconds:.3f}" for seconds in observed)
        print(
            f"{name:<28} plain {statistics.median(plain):.3f} ({min(plain):.3f} to {max(plain):.3f})   observed "
            f"{statistics.median(observed):.3f} ({spread})   ratio {ratio:.3f}",
            flush=True,
        )
    if args.out is not None:
        versions = {name: importlib.metadata.version(name) for name in ("torch", "lightning")}
        settings = {key: str(value) for key, value in vars(args).items()}
        result = {"rows": rows, "settings": settings, "device": device, "versions": versions,
                  "python": platform.python_version(), "commit": commit()}  # fmt: skip
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
