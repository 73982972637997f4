"""The lifecycle matrix says 0 everywhere: some lines here, all of them in `make test-all`."""

import os
import subprocess
import sys

import pytest

from paths import ROOT


def matrix(*arguments):
    command = [sys.executable, str(ROOT / "benchmarks" / "lifecycle.py"), *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
    return done.returncode, done.stdout


def test_some_lines():
    """Shuffled batches, checkpoints at both moments of an epoch, double precision among them."""
    code, out = matrix("--optimizers", "Adam", "LBFGS", "--precisions", "32-true", "64-true")
    assert out.splitlines()[-1] == "24 cells: 24 exact, 0 not offered, 0 failed", out
    assert code == 0


@pytest.mark.slow
def test_all_of_one_process():
    """NAdam in float64 alone is off, by 1e-11: torch keeps its mu_product in float32 and loads it as float64."""
    code, out = matrix()
    assert out.splitlines()[-1] == "408 cells: 392 exact, 12 not offered, 4 failed", out
    (inexact,) = [line for line in out.splitlines() if "e-" in line]
    assert inexact.split()[:2] == ["NAdam", "64-true"]
    assert all(float(cell) < 1e-10 for cell in inexact.split()[3:])
    assert code == 1


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fork"])
def test_two_processes(strategy):
    code, out = matrix("--strategies", strategy, "--optimizers", "SGD", "AdamW", "--precisions", "32-true", "bf16-mixed")
    assert out.splitlines()[-1] == "24 cells: 24 exact, 0 not offered, 0 failed", out
    assert code == 0
