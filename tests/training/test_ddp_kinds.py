"""DDP in all its kinds: spawned and forked processes; DDP's options; the guard; resuming."""

import pytest

from actprune.core.errors import ConfigError
from actprune.training import SpawnedDDP
from averaging import averaging
from ddp_runs import assert_close, caller, same, start


@pytest.mark.parametrize("kind", ["fork", pytest.param("spawn", marks=pytest.mark.slow)])
def test_the_pruned_network_comes_back_from_other_processes(kind, tmp_path):
    """In the caller's process: the weights, the record, the history, why it stopped."""
    (alone,) = start(tmp_path, "alone", devices=1)
    zero, one = start(tmp_path, strategy=kind)
    back = caller(tmp_path)
    assert same(zero, one)
    assert same(back, zero)
    assert_close(back, alone)
    assert [row["params"] for row in back["history"]] == [row["params"] for row in alone["history"]]
    assert back["stopped"]["reason"] == "budget"


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
    if "ema" in OPTIONS[name]:
        averaging()  # where there is none, this test is skipped
    zero, one = start(tmp_path, **OPTIONS[name])
    assert same(zero, one)
    assert len(zero["record"]["steps"]) == 2
    assert zero["stopped"]["reason"] == "budget"


@pytest.mark.slow
def test_the_guard_takes_back_on_every_process_and_resumes(tmp_path):
    """The whole network is needed, so the step is taken back; a run resumed while the verdict is awaited ends the same."""
    zero, one = start(tmp_path, "whole", needed=1712, magnitude=True, save=True)
    assert same(zero, one)
    assert zero["events"] == [(1, False), (3, True)]
    assert zero["stopped"]["reason"] == "metric"
    again = start(tmp_path, "again", needed=1712, magnitude=True, resume=str(tmp_path / "all" / "epoch=1.ckpt"))
    assert all(same(found, zero) for found in again)
    assert len(again) == 2


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["fork", "ddp"])
def test_resume_with_two_processes(kind, tmp_path):
    whole = start(tmp_path, "whole", strategy=kind, save=True)
    for epoch in (0, 2, 4):
        again = start(tmp_path, f"again{epoch}", strategy=kind, resume=str(tmp_path / "all" / f"epoch={epoch}.ckpt"))
        assert all(same(found, expected) for found, expected in zip(again, whole, strict=True))


def test_start_methods_are_checked():
    with pytest.raises(ConfigError, match="start_method='popen' must be spawn, fork or forkserver"):
        SpawnedDDP("popen")
