"""Two processes: one plan, the same network on both, the statistics of all samples, and the wrapper knows the new parameters.

``strategy="ddp"`` runs the script once more for the second process; all runs of this file share one such start.
"""

import pytest
import torch

import ddp_runs
from foreign import OwnForward

RUNS = [
    {"run": "as usual", "name": "usual"},
    {"run": "train", "name": "train"},
    {"run": "observe", "name": "observe"},
    {"run": "draw"},
]


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """What the first process printed, and the folder."""
    folder = tmp_path_factory.mktemp("ddp")
    return ddp_runs.script([{**run, "devices": 2} for run in RUNS], folder), folder


@pytest.fixture(scope="module")
def usual(ran):
    return ddp_runs.found(ran[1], "usual")


def test_both_processes_hold_the_same_smaller_network(usual):
    zero, one = usual
    assert ddp_runs.same(zero, one)
    assert len(zero["record"]["steps"]) >= 2
    before = sum(p.numel() for p in OwnForward().parameters())
    assert zero["record"]["steps"][-1]["params_after"] <= 0.4 * before
    assert len(zero["history"]) == 5


def test_one_process_speaks(ran, usual):
    runs = 2 + 3  # "observe" looks at three criteria
    assert ran[0].count("pruning step 1,") == runs
    assert ran[0].count("pruning step 2,") == 2  # its schedule has one step
    assert ran[0].count("pruning step") == runs + len(usual[0]["record"]["steps"])


def test_two_processes_with_half_the_batch_are_one_process(ran, tmp_path):
    zero, one = ddp_runs.found(ran[1], "train")
    (alone,) = ddp_runs.start(tmp_path, devices=1)
    assert ddp_runs.same(zero, one)
    ddp_runs.assert_close(zero, alone)
    assert len(zero["record"]["steps"]) == 2


def test_two_processes_observe_what_one_does(ran, tmp_path):
    """Criteria of gradients and labels: counts equal, gradients to rounding, and one plan; a repeated sample counts once."""
    (alone,) = ddp_runs.start(tmp_path, devices=1, run="observe")
    for whole, zero, one in zip(alone, *ddp_runs.found(ran[1], "observe"), strict=True):
        assert zero["removed"] == one["removed"] == whole["removed"]
        assert whole["kept"][-1] == zero["kept"][-1] == 33
        for a, b, c in zip(whole["kept"], zero["kept"], one["kept"], strict=True):
            assert torch.equal(b, c)
            torch.testing.assert_close(b, a, rtol=1e-4, atol=1e-9)


def test_each_process_of_a_resumed_run_draws_what_it_would_have_drawn(ran):
    whole, resumed = (ddp_runs.found(ran[1], name) for name in ("whole", "resumed"))
    assert [len(drawn) for drawn in (*whole, *resumed)] == [8, 8, 4, 4]
    assert [drawn[4:] for drawn in whole] == resumed
    assert whole[0] != whole[1]
