"""Two processes: one plan, the same network on both, and the wrapper knows the new parameters."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from foreign import OwnForward
from paths import ROOT

SCRIPT = """
import os
import sys
import torch
from lightning import Trainer, seed_everything
from foreign import OwnForward, loader
from actprune.core.budget import Budget
from actprune.criteria import Entropy
from actprune.training import PruningCallback

torch.set_num_threads(1)
seed_everything(0, verbose=False)
module, callback = OwnForward(), PruningCallback(Entropy(bins=16), Budget(params=0.4))
trainer = Trainer(accelerator="cpu", devices=2, strategy="ddp", max_epochs=5, logger=False, callbacks=[callback],
                  enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False)
trainer.fit(module, loader(), loader(36, 1, batch_size=4))
torch.save({"state": module.state_dict(), "removed": callback.pruner.record.to_dict(), "epochs": len(callback.history)},
           f"{sys.argv[1]}/rank{trainer.global_rank}.pt")
"""


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ddp")
    (folder / "script.py").write_text(SCRIPT)
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "tests"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(folder / "script.py"), str(folder)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout, [torch.load(Path(folder) / f"rank{rank}.pt", weights_only=True) for rank in (0, 1)]


def test_both_processes_hold_the_same_smaller_network(ranks):
    _, (zero, one) = ranks
    assert zero["removed"] == one["removed"]
    assert len(zero["removed"]["steps"]) >= 2
    assert all(torch.equal(value, one["state"][name]) for name, value in zero["state"].items())
    before = sum(p.numel() for p in OwnForward().parameters())
    assert zero["removed"]["steps"][-1]["params_after"] <= 0.4 * before
    assert zero["epochs"] == 5


def test_one_process_speaks(ranks):
    out, (zero, _) = ranks
    assert out.count("pruning step 1,") == 1
    assert out.count("pruning step") == len(zero["removed"]["steps"])
