"""DDP in all its kinds: processes that run the script, spawned and forked ones; DDP's options; the guard; resuming."""

import json
import os
import subprocess
import sys

import pytest
import torch

from actprune.core.errors import ConfigError
from actprune.training import SpawnedDDP
from paths import ROOT

WORKER = ROOT / "tests" / "training" / "ddp_worker.py"


def start(folder, name="run", devices=2, **settings):
    """Run the worker; what every process ended with."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT / 'tests'}:{os.environ.get('PYTHONPATH', '')}"}
    content = json.dumps({"name": name, "devices": devices, **settings})
    done = subprocess.run([sys.executable, str(WORKER), content, str(folder)], env=environment, capture_output=True, text=True,
                          timeout=240)  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return [torch.load(path, weights_only=True) for path in sorted(folder.glob(f"{name}-*.pt"))]


def same(one, other):
    return one["record"] == other["record"] and all(torch.equal(v, other["state"][n]) for n, v in one["state"].items())


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    (found,) = start(tmp_path_factory.mktemp("alone"), devices=1)
    return found


def close(one, other):
    """The same units left at the same time, and training differs by rounding only."""
    assert one["record"]["removed"] == other["record"]["removed"]
    assert one["record"]["widths"] == other["record"]["widths"]
    assert one["events"] == other["events"]
    for name, value in one["state"].items():
        torch.testing.assert_close(value, other["state"][name], rtol=1e-3, atol=1e-4)


def test_two_processes_with_half_the_batch_are_one_process(alone, tmp_path):
    zero, one = start(tmp_path)
    assert same(zero, one)
    close(zero, alone)
    assert len(zero["record"]["steps"]) == 2


@pytest.mark.parametrize("kind", ["fork", pytest.param("spawn", marks=pytest.mark.slow)])
def test_the_pruned_network_comes_back_from_other_processes(kind, alone, tmp_path):
    """In the caller's process: the weights, the record, the history, why it stopped."""
    (found,) = start(tmp_path, strategy=kind)
    close(found, alone)
    assert [row["params"] for row in found["history"]] == [row["params"] for row in alone["history"]]
    assert found["stopped"]["reason"] == "budget"


OPTIONS = {
    "static graph": {"ddp": {"static_graph": True}},
    "bucket views": {"ddp": {"gradient_as_bucket_view": True}},
    "accumulation with bucket views": {"ddp": {"gradient_as_bucket_view": True}, "accumulate": 3},
    "unused parameters": {"ddp": {"find_unused_parameters": True}, "unused": True},
    "moving average": {"ema": True},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", OPTIONS)
def test_options_of_ddp(name, tmp_path):
    zero, one = start(tmp_path, **OPTIONS[name])
    assert same(zero, one)
    assert len(zero["record"]["steps"]) == 2
    assert zero["stopped"]["reason"] == "budget"


@pytest.mark.slow
def test_the_guard_takes_back_on_every_process_and_resumes(tmp_path):
    """The whole network is needed, so the step is taken back; a run resumed while the verdict is awaited ends the same."""
    zero, one = start(tmp_path, name="whole", needed=1712, magnitude=True, save=True)
    assert same(zero, one)
    assert zero["events"] == [(1, False), (3, True)]
    assert zero["stopped"]["reason"] == "metric"
    again = start(tmp_path, name="again", needed=1712, magnitude=True, resume=str(tmp_path / "all" / "epoch=1.ckpt"))
    assert all(same(found, zero) for found in again)
    assert len(again) == 2


@pytest.mark.slow
def test_resume_with_two_processes(tmp_path):
    whole = start(tmp_path, name="whole", save=True)
    for epoch in (0, 2, 4):
        again = start(tmp_path, name=f"again{epoch}", resume=str(tmp_path / "all" / f"epoch={epoch}.ckpt"))
        assert all(same(found, expected) for found, expected in zip(again, whole, strict=True))


def test_start_methods_are_checked():
    with pytest.raises(ConfigError, match="start_method='popen' must be spawn, fork or forkserver"):
        SpawnedDDP("popen")
