"""Start the runs of ddp_worker, and compare what their processes ended with."""

import json
import os
import subprocess
import sys

import torch

import ddp_worker
from paths import ROOT
from processes import FORKS, Fork


def script(listed, folder):
    """Run ddp_worker as a script, one run after the other; what it printed."""
    line, environment = _command(listed, folder)
    done = subprocess.run(line, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def _command(listed, folder):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT / 'tests'}:{os.environ.get('PYTHONPATH', '')}"}
    return [sys.executable, ddp_worker.__file__, json.dumps(listed), str(folder)], environment


def _forked(listed, folder):
    """Lightning forks no process in which CUDA was asked for, and any Trainer asks: then a fresh one takes this one's place."""
    if torch.cuda._is_in_bad_fork():
        line, environment = _command(listed, folder)
        os.execve(line[0], line, environment)
    ddp_worker.main(listed, folder)


def start(folder, name="run", devices=2, strategy="fork", **settings):
    """One run: in a fork of this process where one process or forked ones are asked for; what every process ended with."""
    run = {"name": name, "devices": devices, "strategy": strategy, **settings}
    if FORKS and strategy == "fork":
        done = Fork(_forked, [run], str(folder), folder=folder).wait()
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    else:
        script([run], folder)
    return found(folder, name)


def found(folder, name):
    """What every process of a run ended with."""
    return [torch.load(path, weights_only=True) for path in sorted(folder.glob(f"{name}-[0-9].pt"))]


def caller(folder, name="run"):
    """What the process ended with that started the others."""
    return torch.load(folder / f"{name}-caller.pt", weights_only=True)


def same(one, other):
    """The same units left, the same values bit by bit."""
    return one["record"] == other["record"] and all(torch.equal(v, other["state"][n]) for n, v in one["state"].items())


def assert_close(one, other):
    """The same units left at the same time, and training differs by rounding only."""
    assert one["record"]["removed"] == other["record"]["removed"]
    assert one["record"]["widths"] == other["record"]["widths"]
    assert one["events"] == other["events"]
    for name, value in one["state"].items():
        torch.testing.assert_close(value, other["state"][name], rtol=1e-3, atol=1e-4)
