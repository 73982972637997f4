"""Train and prune a tiny network again and again while it is killed: the driver of test_crash.

``main`` forks one process per attempt; each is killed with SIGKILL at a moment that is drawn: some milliseconds after its
start, inside surgery, while a checkpoint is written, or between writing and renaming it. After every kill all checkpoints are
looked at. Prints one JSON line: kills by moment, attempts, and the largest difference.
"""

import json
import logging
import os
import random
import signal
import sys
import time
import traceback
import warnings
from collections import Counter
from pathlib import Path

import torch
from lightning import Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader

from actprune.core.budget import Budget
from actprune.core.record import SurgeryRecord
from actprune.criteria import Entropy
from actprune.schedule import Schedule
from actprune.surgery import apply_record, optimizer, save_pruned
from actprune.training import AtomicCheckpoints, PruningCallback, RandomState, newest_checkpoint
from foreign import OneNetwork, dataset

MOMENTS = ("any", "any", "surgery", "write", "rename")


def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)


def arm(moment, countdown, delay):
    """Have this process killed at a moment."""
    if moment == "any":
        signal.signal(signal.SIGALRM, die)
        signal.setitimer(signal.ITIMER_REAL, delay)
        return
    left = [countdown]

    def soon(function, before):
        def wrapped(*args, **kwargs):
            left[0] -= 1
            if left[0] <= 0:
                before(*args)
                die()
            return function(*args, **kwargs)

        return wrapped

    if moment == "surgery":
        optimizer.follow = soon(optimizer.follow, lambda *_: None)  # called for every tensor that was replaced
    elif moment == "write":
        save = torch.save

        def half(content, file):
            save(content, file)
            file.truncate(file.seek(0, os.SEEK_END) // 2)
            file.flush()

        torch.save = soon(torch.save, half)
    else:
        Path.replace = soon(Path.replace, lambda *_: None)


def train(folder, guarded):
    seed_everything(0, verbose=False)
    module, schedule = OneNetwork(), Schedule("linear", start=1, interval=2, steps=4)
    options = {"monitor": "val_loss", "max_metric_drop": 0.0} if guarded else {}
    pruning = PruningCallback(Entropy(bins=16), Budget(params=0.3), schedule, **options)
    saved = ModelCheckpoint(folder / "checkpoints", "{epoch}", monitor="val_loss", save_top_k=2, save_last=True)
    trainer = Trainer(accelerator="cpu", devices=1, max_epochs=12, logger=False, callbacks=[pruning, saved, RandomState()],
                      enable_progress_bar=False, enable_model_summary=False, plugins=[AtomicCheckpoints()],
                      default_root_dir=folder)  # fmt: skip
    loaders = DataLoader(dataset(96), batch_size=16, shuffle=True), DataLoader(dataset(32, 1), batch_size=16)
    trainer.fit(module, *loaders, ckpt_path=newest_checkpoint(folder / "checkpoints"))
    save_pruned(module.model, folder / "final.pt")
    (folder / "back.json").write_text(json.dumps(sum(bool(event.get("went_back")) for event in pruning.events)))


def attempt(folder, guarded, armed=None):
    """Run once in a process of its own; its exit status."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            if armed is not None:
                arm(*armed)
            sys.stdout = open(os.devnull, "w")  # noqa: SIM115
            train(folder, guarded)
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    return os.waitpid(child, 0)[1]


def look(folder):
    """Every checkpoint there is loads, and its record gives a fresh network the shapes of its weights."""
    for path in (folder / "checkpoints").glob("[!.]*.ckpt"):
        content = torch.load(path, weights_only=True)
        fresh = OneNetwork()
        for name, record in content.get("actprune", {}).items():
            apply_record(fresh.get_submodule(name), SurgeryRecord.from_dict(record))
        fresh.load_state_dict(content["state_dict"])


def main(folder, kills, seed):
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    draw, counts = random.Random(seed), Counter()
    worst, attempts, guarded = 0.0, 0, False
    finals = {}
    for guarded in (False, True):
        whole = folder / f"whole{guarded}"
        began = time.monotonic()
        assert attempt(whole, guarded) == 0
        finals[guarded] = torch.load(whole / "final.pt", weights_only=True), time.monotonic() - began
    number, back = 0, json.loads((folder / "wholeTrue" / "back.json").read_text())
    while sum(counts.values()) < kills:
        guarded = bool(number % 2)
        run, (expected, seconds) = folder / f"run{number}", finals[guarded]
        number += 1
        for _ in range(200):
            attempts += 1
            moment = MOMENTS[draw.randrange(len(MOMENTS))]
            armed = (moment, draw.randint(1, 12), draw.uniform(0.02, seconds)) if sum(counts.values()) < kills else None
            status = attempt(run, guarded, armed)
            look(run)
            if status == 0:
                break
            assert status == signal.SIGKILL, f"attempt {attempts} ended with {status}"
            counts[moment] += 1
        found = torch.load(run / "final.pt", weights_only=True)
        assert found["surgery_record"] == expected["surgery_record"]
        for name, value in expected["state_dict"].items():
            worst = max(worst, float((found["state_dict"][name].double() - value.double()).abs().max()))
    print(json.dumps({"kills": dict(counts), "runs": number, "attempts": attempts, "difference": worst, "went_back": back}))
