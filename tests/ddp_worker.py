"""Runs of the tests of DDP: each trains and prunes by its settings and saves what every process ends with.

As a script, SETTINGS FOLDER: a JSON list of settings, one run after the other in the same processes.
"""

import json
import random
import sys
from pathlib import Path

import numpy as np
import torch
from lightning import Callback, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy
from torch.utils.data import DataLoader, DistributedSampler

from actprune import criteria
from actprune.core.budget import Budget
from actprune.core.record import record_of
from actprune.schedule import Schedule
from actprune.training import PruningCallback, RandomState, SeReNe, SpawnedDDP
from averaging import averaging
from foreign import OwnForward, dataset, loader

SILENT = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_model_summary": False}


class Net(OwnForward):
    """Plain SGD without batch norm, so that half a batch on each of two processes is one whole batch."""

    whole = 0

    def __init__(self):
        super().__init__()
        self.norm = torch.nn.Identity()
        self.unused = torch.nn.Linear(2, 2)

    def configure_optimizers(self):
        return torch.optim.SGD([p for n, p in self.named_parameters() if "unused" not in n], lr=0.05, momentum=0.9)

    def train_dataloader(self):
        return self.part(dataset(96))

    def val_dataloader(self):
        return self.part(dataset(32, 1))

    def part(self, data):
        """Sample r, r + R, ...: the batches of all R processes together are those of one; Lightning's own sampler shuffles."""
        ranks = self.trainer.world_size
        sampler = DistributedSampler(data, ranks, self.trainer.global_rank, shuffle=False)
        return DataLoader(data, batch_size=16 // ranks, sampler=sampler)

    def validation_step(self, batch, batch_idx):
        super().validation_step(batch, batch_idx)
        left = sum(p.numel() for p in self.parameters())
        self.log("quality", float(left >= self.whole), sync_dist=True)


class Keep(Callback):
    """Saves what each process ends with."""

    def __init__(self, pruning, path):
        self.pruning, self.path = pruning, path

    def on_fit_end(self, trainer, pl_module):
        save(pl_module, self.pruning, f"{self.path}-{trainer.global_rank}.pt")


def save(module, pruning, path):
    content = {
        "state": module.state_dict(),
        "record": record_of(module).to_dict(),
        "history": pruning.history,
        "events": [(event["epoch"], bool(event.get("went_back"))) for event in pruning.events],
        "stopped": pruning.stopped,
    }
    torch.save(content, path)


def strategy(settings):
    if settings["devices"] == 1:
        return "auto"
    kind, extra = settings.get("strategy", "ddp"), settings.get("ddp", {})
    return DDPStrategy(**extra) if kind == "ddp" else SpawnedDDP(kind, **extra)


def train(settings, folder):
    """Two steps; saves also what the caller of other processes gets, as NAME-caller.pt."""
    seed_everything(0, verbose=False)
    module = Net()
    if not settings.get("unused", False):
        del module.unused
    module.whole = settings.get("needed", 0)
    options = {"monitor": "quality", "mode": "max", "max_metric_drop": 0.1} if module.whole else {}
    criterion = criteria.Magnitude() if settings.get("magnitude") else criteria.RMS()
    schedule = Schedule("linear", start=0, interval=2, steps=2)
    pruning = PruningCallback(criterion, Budget(params=0.5), schedule, **options)
    if settings.get("serene"):
        pruning = SeReNe(Budget(params=0.05), 0.02, settings["serene"], 0.5, schedule=schedule)
    path = folder / settings["name"]
    callbacks = [pruning, *([averaging(decay=0.5)] if settings.get("ema") else []), Keep(pruning, path)]
    if settings.get("save"):
        callbacks.append(ModelCheckpoint(folder / "all", "{epoch}", save_top_k=-1, enable_version_counter=False))
    trainer = Trainer(devices=settings["devices"], strategy=strategy(settings), max_epochs=6, callbacks=callbacks,
                      enable_checkpointing=bool(settings.get("save")), use_distributed_sampler=False,
                      accumulate_grad_batches=settings.get("accumulate", 1), default_root_dir=folder, **SILENT)  # fmt: skip
    trainer.fit(module, ckpt_path=settings.get("resume"))
    if trainer.is_global_zero:
        save(module, pruning, f"{path}-caller.pt")


def train_as_usual(settings, folder):
    """Batch norm, histograms, Lightning's own sampler."""
    seed_everything(0, verbose=False)
    module, pruning = OwnForward(), PruningCallback(criteria.Entropy(bins=16), Budget(params=0.4))
    trainer = Trainer(devices=settings["devices"], strategy=strategy(settings), max_epochs=5, enable_checkpointing=False,
                      callbacks=[pruning, Keep(pruning, folder / settings["name"])], **SILENT)  # fmt: skip
    trainer.fit(module, loader(), loader(36, 1, batch_size=4))


def observe(settings, folder):
    """What criteria of gradients and labels see of a network that learns nothing, and the plan that comes of it.

    33 samples: two processes get 17 each, and the last batch of the second holds nothing but a repeated one.
    """
    devices, found = settings["devices"], []
    for criterion in (criteria.Taylor(), criteria.LabelInformation(classes=4), criteria.Sensitivity()):
        seed_everything(0, verbose=False)
        module = OwnForward()
        module.norm.momentum = 0.0
        module.configure_optimizers = lambda module=module: torch.optim.SGD(module.parameters(), lr=0.0)
        pruning, kept = PruningCallback(criterion, Budget(params=0.5), Schedule(steps=1, start=0), compensation=None), []
        watch(pruning, kept)
        trainer = Trainer(devices=devices, strategy=strategy(settings), max_epochs=2, enable_checkpointing=False,
                          callbacks=[pruning], **SILENT)  # fmt: skip
        trainer.fit(module, loader(64, batch_size=16 // devices), loader(33, 1, batch_size=16 // devices))
        found.append({"kept": kept, "removed": pruning.pruner.record.removed})
    torch.save(found, folder / f"{settings['name']}-{trainer.global_rank}.pt")


class Drawing(OwnForward):
    """Draws from every generator in each batch; each process from its own seed."""

    def __init__(self, seeded):
        super().__init__()
        self.seeded, self.drawn = seeded, []

    def on_train_start(self):
        if self.seeded:
            seed_everything(self.global_rank, verbose=False)

    def on_train_batch_end(self, outputs, batch, batch_idx):
        self.drawn.append((random.random(), float(np.random.rand()), float(torch.rand(()))))


class KeepDrawn(Callback):
    def __init__(self, path):
        self.path = path

    def on_fit_end(self, trainer, pl_module):
        torch.save(pl_module.drawn, f"{self.path}-{trainer.global_rank}.pt")


def draw(settings, folder):
    """A whole run, and one that goes on in its middle."""
    for name, checkpoint in (("whole", None), ("resumed", folder / "whole" / "epoch=1.ckpt")):
        seed_everything(0, verbose=False)
        callbacks = [RandomState(), ModelCheckpoint(folder / name, "{epoch}", save_top_k=-1), KeepDrawn(folder / name)]
        trainer = Trainer(devices=settings["devices"], strategy=strategy(settings), max_epochs=4, callbacks=callbacks,
                          default_root_dir=folder, limit_train_batches=2, **SILENT)  # fmt: skip
        trainer.fit(Drawing(checkpoint is None), loader(64, batch_size=8), loader(16, 1), ckpt_path=checkpoint)


def watch(pruning, kept):
    """Keep the values of the statistics that a step is decided by."""
    decide = pruning.on_validation_end

    def spy(trainer, pl_module):
        if pruning._observer is not None:
            scores = pruning._observer.observations[""].scores
            statistics = [s for by in scores.values() for sites in by.values() for s in sites]
            kept.extend([*(s.compute() for s in statistics), statistics[0].n_samples])
        decide(trainer, pl_module)

    pruning.on_validation_end = spy


RUNS = {"train": train, "as usual": train_as_usual, "observe": observe, "draw": draw}


def main(listed, folder):
    torch.set_num_threads(1)
    for settings in listed:
        RUNS[settings.get("run", "train")](settings, Path(folder))


if __name__ == "__main__":
    main(json.loads(sys.argv[1]), sys.argv[2])
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()  # gloo's threads may abort a process that ends with them
