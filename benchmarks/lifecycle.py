"""The lifecycle matrix: optimizers x precision x strategy x the moment at which a run is cut off and resumed.

Every line is one run that trains and prunes a small network in two steps and writes a checkpoint at every epoch; it is then
resumed in a fresh module from the checkpoint of every moment, and the final weights are compared with those of the whole run. A
cell is the largest difference of any weight: 0 is what is asked for. `-` : Lightning or torch does not offer the combination
(listed in NOT_OFFERED); FAIL: an error, told below the table.

    python benchmarks/lifecycle.py                      # one process; a minute or two
    python benchmarks/lifecycle.py --strategies single ddp fork
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import io
import json
import logging
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path

import torch
from lightning import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from actprune.core.budget import Budget
from actprune.core.record import record_of
from actprune.criteria import Entropy
from actprune.schedule import Schedule
from actprune.training import PruningCallback, RandomState, SpawnedDDP

OPTIMIZERS = {
    "SGD": lambda p: torch.optim.SGD(p, 0.05, momentum=0.9, nesterov=True),
    "SGD fused": lambda p: torch.optim.SGD(p, 0.05, momentum=0.9, fused=True),
    "Adam": lambda p: torch.optim.Adam(p, 0.01),
    "Adam amsgrad foreach": lambda p: torch.optim.Adam(p, 0.01, amsgrad=True, foreach=True),
    "AdamW": lambda p: torch.optim.AdamW(p, 0.01),
    "AdamW fused": lambda p: torch.optim.AdamW(p, 0.01, fused=True),
    "Adamax": lambda p: torch.optim.Adamax(p, 0.01),
    "NAdam": lambda p: torch.optim.NAdam(p, 0.01),
    "RAdam": lambda p: torch.optim.RAdam(p, 0.01),
    "RMSprop": lambda p: torch.optim.RMSprop(p, 0.005, momentum=0.5, centered=True),
    "Rprop": lambda p: torch.optim.Rprop(p, 0.01),
    "Adagrad": lambda p: torch.optim.Adagrad(p, 0.05),
    "Adadelta": lambda p: torch.optim.Adadelta(p, 1.0),
    "ASGD": lambda p: torch.optim.ASGD(p, 0.05),
    "Adafactor": lambda p: torch.optim.Adafactor(p, 0.02),
    "LBFGS": lambda p: torch.optim.LBFGS(p, 0.1, max_iter=3, history_size=4),
    "Muon": lambda p: torch.optim.Muon(p, 0.01),
}
PRECISIONS = ("32-true", "64-true", "bf16-mixed", "16-mixed")
MOMENTS = {
    "before": ("end", 0),
    "step decided": ("end", 1),
    "between": ("end", 2),
    "at validation": ("validation", 3),
    "after": ("end", 4),
    "last.ckpt": ("last", 4),
}
NOT_OFFERED = {("LBFGS", "bf16-mixed"), ("LBFGS", "16-mixed")}  # Lightning: closures and mixed precision


class Task(LightningModule):
    def __init__(self, optimizer: str) -> None:
        super().__init__()
        matrices = optimizer == "Muon"
        self.net = nn.Sequential(nn.Linear(16, 24, not matrices), nn.ReLU(), nn.Linear(24, 20, not matrices), nn.ReLU(),
                                 nn.Linear(20, 4, not matrices))  # fmt: skip
        self.optimizer = optimizer

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", F.cross_entropy(self.net(batch[0]), batch[1]), sync_dist=True)

    def configure_optimizers(self):
        return OPTIMIZERS[self.optimizer](self.parameters())


class AtValidation(Callback):
    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_validation_end(self, trainer, pl_module):
        if not trainer.sanity_checking:
            trainer.save_checkpoint(self.folder / "validation" / f"epoch={trainer.current_epoch}.ckpt")


def loaders(dtype):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(128, 16, generator=generator).to(dtype)
    y = (x[:, :4] + 0.1 * torch.randn(128, 4, generator=generator)).argmax(1)
    return DataLoader(TensorDataset(x, y), 32, shuffle=True), DataLoader(TensorDataset(x[:64], y[:64]), 32)


def fit(task, precision, strategy, folder, saving, checkpoint=None):
    compensation = {"compensation": None} if task.optimizer == "Muon" else {}
    pruning = PruningCallback(
        Entropy(bins=16), Budget(params=0.4), Schedule("linear", start=1, interval=2, steps=2), **compensation
    )
    callbacks = [pruning, RandomState()]
    if saving:
        callbacks += [AtValidation(folder), ModelCheckpoint(folder / "end", "{epoch}", save_top_k=-1, save_last=True)]
    kinds = {"single": "auto", "ddp": "ddp", "fork": SpawnedDDP("fork")}
    devices = 1 if strategy == "single" else 2
    trainer = Trainer(accelerator="cpu", devices=devices, strategy=kinds[strategy], precision=precision, max_epochs=5,
                      callbacks=callbacks, logger=False, enable_checkpointing=saving, enable_progress_bar=False,
                      enable_model_summary=False, default_root_dir=folder)  # fmt: skip
    seed_everything(1, verbose=False)
    trainer.fit(task, *loaders(torch.float64 if precision == "64-true" else torch.float32), ckpt_path=checkpoint)
    return pruning


def line(optimizer, precision, strategy, folder):
    """Moment -> largest difference of a resumed run, `-` or FAIL."""
    if (optimizer, precision) in NOT_OFFERED:
        return dict.fromkeys(MOMENTS, "-")
    seed_everything(0, verbose=False)
    start = Task(optimizer)
    whole = copy.deepcopy(start)
    try:
        fit(whole, precision, strategy, folder, saving=True)
    except Exception as error:
        return dict.fromkeys(MOMENTS, f"FAIL: {type(error).__name__}: {error}"[:200])
    cells = {}
    for moment, (place, epoch) in MOMENTS.items():
        path = folder / ("end/last.ckpt" if place == "last" else f"{place}/epoch={epoch}.ckpt")
        again = copy.deepcopy(start)
        try:
            fit(again, precision, strategy, folder, saving=False, checkpoint=path)
            cells[moment] = difference(again, whole)
        except Exception as error:
            cells[moment] = f"FAIL: {type(error).__name__}: {error}"[:200]
    return cells


def difference(one, other):
    if record_of(one.net).to_dict() != record_of(other.net).to_dict():
        return "FAIL: other units left"
    ours, theirs = one.state_dict(), other.state_dict()
    return max(float((value.double() - theirs[name].double()).abs().max()) for name, value in ours.items())


def matrix(strategy, optimizers, precisions, folder):
    rows = []
    for optimizer in optimizers:
        for precision in precisions:
            place = folder / f"{optimizer} {precision} {strategy}"
            rows.append(
                {
                    "optimizer": optimizer,
                    "precision": precision,
                    "strategy": strategy,
                    **line(optimizer, precision, strategy, place),
                }
            )
    return rows


def show(rows):
    names = ["optimizer", "precision", "strategy", *MOMENTS]
    texts = [[spell(row[name]) for name in names] for row in rows]
    widths = [max(len(name), *(len(text[i]) for text in texts)) for i, name in enumerate(names)]
    for text in [names, *texts]:
        print("  ".join(cell.ljust(width) for cell, width in zip(text, widths, strict=True)).rstrip())
    cells = [row[moment] for row in rows for moment in MOMENTS]
    failed = [cell for cell in cells if isinstance(cell, str) and cell != "-" or isinstance(cell, float) and cell != 0.0]
    exact, absent = sum(cell == 0.0 for cell in cells), cells.count("-")
    print(f"\n{len(cells)} cells: {exact} exact, {absent} not offered, {len(failed)} failed")
    for cell in dict.fromkeys(cell for cell in failed if isinstance(cell, str)):
        print(cell)
    return not failed


def spell(cell):
    if isinstance(cell, float):
        return "0" if cell == 0.0 else f"{cell:.1e}"
    return cell.split(":")[0]


def main(given=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--strategies", nargs="+", default=["single"], choices=["single", "ddp", "fork"])
    parser.add_argument("--optimizers", nargs="+", default=list(OPTIMIZERS), choices=list(OPTIMIZERS))
    parser.add_argument("--precisions", nargs="+", default=list(PRECISIONS), choices=list(PRECISIONS))
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args(given)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    if arguments.out is not None:  # Lightning runs this process once more for the second one
        rows = matrix("ddp", arguments.optimizers, arguments.precisions, arguments.out)
        (arguments.out / f"rows{torch.distributed.get_rank()}.json").write_text(json.dumps(rows))
        torch.distributed.destroy_process_group()  # gloo's threads may abort a process that ends with them
        return 0
    rows = []
    for strategy in arguments.strategies:
        with tempfile.TemporaryDirectory() as folder:
            if strategy == "ddp":
                rows += by_script(arguments, Path(folder))
            else:
                with contextlib.redirect_stdout(io.StringIO()):  # a line per step
                    rows += matrix(strategy, arguments.optimizers, arguments.precisions, Path(folder))
    return 0 if show(rows) else 1


def by_script(arguments, folder):
    command = [sys.executable, __file__, "--optimizers", *arguments.optimizers, "--precisions", *arguments.precisions]
    subprocess.run([*command, "--out", str(folder)], check=True, stdout=subprocess.DEVNULL)
    return json.loads((folder / "rows0.json").read_text())


if __name__ == "__main__":
    sys.exit(main())
