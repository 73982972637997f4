"""``resume=DIR``: a job or a sweep that was cut off goes on in its own folder."""

import json
import time

import pytest
import torch

from actprune.cli.job import run_job
from actprune.cli.resuming import command_line
from actprune.core.errors import ConfigError
from actprune.report.runs import read_runs
from processes import needs_fork, start_run_py

SMALL = ("debug=fast", "data.batch_size=16", "pruner=magnitude", "logger=csv", "trainer.max_epochs=6", "schedule.start=1")
KEPT = ("summary.json", "overrides.yaml", "hydra.yaml")


def state(folder):
    return torch.load(folder / "pruned.pt", weights_only=True)


def same(one, other):
    return one["surgery_record"] == other["surgery_record"] and all(
        torch.equal(value, other["state_dict"][name]) for name, value in one["state_dict"].items()
    )


def kill_when(path, command, cwd, timeout=120):
    """Start run.py and kill -9 it as soon as ``path`` exists."""
    process = start_run_py(*command, folder=cwd)
    end = time.monotonic() + timeout
    while not list(cwd.glob(path)) and process.poll() is None and time.monotonic() < end:
        time.sleep(0.01)
    process.kill()
    assert list(cwd.glob(path))


@needs_fork
def test_a_killed_sweep_goes_on_where_it_was(command, tmp_path):
    """The first job is not run again, the second goes on from its checkpoint to the same network, the third starts."""
    done = command(*SMALL, "seed=2", "hydra.run.dir=whole")
    assert done.returncode == 0, done.stderr
    kill_when("cut/1/checkpoints/last.ckpt", ["-m", *SMALL, "seed=1,2,3", "hydra.sweep.dir=cut"], tmp_path)
    first = (tmp_path / "cut" / "0" / "summary.json").read_text()
    assert not (tmp_path / "cut" / "1" / "summary.json").exists()
    again = command("resume=cut")
    assert again.returncode == 0, again.stderr
    assert again.stdout.count("finished already") == 1
    assert (tmp_path / "cut" / "0" / "summary.json").read_text() == first
    summaries = [json.loads((tmp_path / "cut" / job / "summary.json").read_text()) for job in ("0", "1", "2")]
    assert [summary["seed"] for summary in summaries] == [1, 2, 3]
    assert same(state(tmp_path / "cut" / "1"), state(tmp_path / "whole"))
    assert summaries[1]["history"] == json.loads((tmp_path / "whole" / "summary.json").read_text())["history"]
    assert [path.name for path in (tmp_path / "cut" / "1" / "checkpoints").glob("last*")] == ["last.ckpt"]


@pytest.mark.slow
@needs_fork
def test_one_job_goes_on_and_takes_new_settings(command, tmp_path):
    kill_when("run/checkpoints/last.ckpt", [*SMALL, "hydra.run.dir=run"], tmp_path)
    again = command("resume=run", "trainer.max_epochs=7")
    assert again.returncode == 0, again.stderr
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert [row["epoch"] for row in summary["history"]] == list(range(7))
    assert summary["criterion"] == "magnitude"
    assert not (tmp_path / "runs").exists()
    third = command("resume=run")
    assert "finished already" in third.stdout


@needs_fork
def test_a_finished_run_takes_no_other_settings(command, tmp_path):
    done = command(*SMALL[:-2], "hydra.run.dir=run", "trainer.max_epochs=2")
    assert done.returncode == 0, done.stderr
    kept = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*.[jy]*") if path.name in KEPT}
    assert len(kept) == 3
    for setting in ("trainer.max_epochs=5", "+trainer.max_steps=3", "pruner=random", "debug=overfit"):
        again = command("resume=run", setting)
        assert again.returncode == 1, setting
        assert f"run is finished and did not run with {setting}: leave that out" in again.stderr
        assert f"ckpt_path={tmp_path / 'run' / 'checkpoints' / 'last.ckpt'}" in again.stderr
    for settings in ([], ["trainer.max_epochs=2", "pruner=magnitude", "optimizer=adamw"], ["optimize=test_accuracy"]):
        again = command("resume=run", *settings)
        assert again.returncode == 0, again.stderr
        assert again.stdout.splitlines() == [f"finished already: {tmp_path / 'run'}"]
    assert all(path.read_bytes() == content for path, content in kept.items())
    longer = [*SMALL[:-2], "trainer.max_epochs=3", "ckpt_path=run/checkpoints/last.ckpt", "hydra.run.dir=on"]
    assert command(*longer).returncode == 0
    assert [row["epoch"] for row in json.loads((tmp_path / "on" / "summary.json").read_text())["history"]] == [0, 1, 2]


@needs_fork
def test_what_was_refused_is_forgotten(command, tmp_path):
    """By a folder that was cut off, of a job or a sweep; another task does not write there either."""
    done = command("-m", *SMALL[:-2], "trainer.max_epochs=2", "seed=1", "hydra.sweep.dir=many")
    assert done.returncode == 0, done.stderr
    job = tmp_path / "many" / "0"
    (job / "summary.json").unlink()
    kept = {path: path.read_bytes() for path in (tmp_path / "many").rglob("*.yaml")}
    assert len(kept) == 5
    for refused, why in (
        (["resume=many", "+budget.foo=1"], "budget.foo"),
        (["resume=many", "pruner=none"], "size mismatch"),
        (["pruner=random", "seed=5", f"hydra.run.dir={job}"], "holds another run"),
        (["task=plan", f"hydra.run.dir={job}"], "holds another run"),
    ):
        again = command(*refused)
        assert again.returncode == 1, refused
        assert why in again.stderr
        assert {path: path.read_bytes() for path in kept} == kept
    again = command("resume=many")
    assert again.returncode == 0, again.stderr
    assert json.loads((job / "summary.json").read_text())["criterion"] == "magnitude"


@needs_fork
def test_finished_jobs_of_a_sweep_keep_their_settings(command, tmp_path):
    """The others take what is given; what is written of each is what it ran with, which reports read."""
    done = command("-m", *SMALL[:-2], "trainer.max_epochs=2", "seed=1,2", "hydra.sweep.dir=many")
    assert done.returncode == 0, done.stderr
    (tmp_path / "many" / "1" / "summary.json").unlink()
    written = {path: path.read_bytes() for path in (tmp_path / "many" / "0" / ".hydra").iterdir()}
    again = command("resume=many", "trainer.max_epochs=3", "scheduler=none")
    assert again.returncode == 0, again.stderr
    told = "1 finished job kept as before; trainer.max_epochs=3, scheduler=none is for the others"
    assert told in again.stdout.splitlines()
    assert len(written) == 3
    assert all(path.read_bytes() == content for path, content in written.items())
    assert json.loads((tmp_path / "many" / "1" / "summary.json").read_text())["epochs"] == 3
    runs, _ = read_runs(tmp_path / "many")
    assert [[o for o in run.overrides if "max_epochs" in o] for run in runs] == [
        ["trainer.max_epochs=2"],
        ["trainer.max_epochs=3"],
    ]


@pytest.mark.parametrize("task", ["train", "prune", "plan", "analyze", "capacity"])
@pytest.mark.parametrize("held", ["summary.json", "checkpoints/last.ckpt"])
def test_another_run_is_not_written_over(fast, tmp_path, held, task):
    (tmp_path / "out" / held).parent.mkdir(parents=True)
    (tmp_path / "out" / held).write_text("{}")
    with pytest.raises(
        ConfigError, match=f"out holds another run .{held}.: resume=.*out goes on with that one, hydra.run.dir="
    ):
        run_job(fast(f"task={task}"))
    assert not (tmp_path / "out" / "config.yaml").exists()


def test_no_folder_no_run(command):
    done = command("resume=nowhere")
    assert done.returncode == 1
    assert "nowhere is no output folder" in done.stderr
    assert len(done.stderr.splitlines()) <= 3


def test_command_line(tmp_path):
    (tmp_path / "a b" / ".hydra").mkdir(parents=True)
    (tmp_path / "a b" / ".hydra" / "overrides.yaml").write_text("- seed=3\n- resume='x'\n- pruner=random\n")
    folder = tmp_path / "a b"
    expected = ["seed=3", "pruner=random", "seed=4", f"hydra.run.dir='{folder}'", f"resume='{folder}'"]
    assert command_line([f"resume={folder}", "seed=4"]) == expected
    assert command_line([f"resume='{folder}'", "seed=4"]) == expected
    assert command_line(["seed=1"]) == ["seed=1"]
    assert command_line(["resume=null"]) == ["resume=null"]
    with pytest.raises(ConfigError, match="is one job, which -m cannot vary"):
        command_line(["-m", f"resume={folder}"])


def test_a_sweeper_that_chooses_by_itself_is_refused(tmp_path):
    (tmp_path / "multirun.yaml").write_text(
        "hydra: {sweeper: {_target_: hydra_plugins.optuna.Sweeper}, overrides: {task: [], hydra: []}}"
    )
    with pytest.raises(ConfigError, match="hydra_plugins.optuna.Sweeper chooses its jobs by itself"):
        command_line([f"resume={tmp_path}"])


def test_a_sweep_does_not_run_once_per_process(command):
    done = command("-m", *SMALL, "trainer=ddp", "seed=1,2")
    assert done.returncode == 1
    assert "every one of the 2 processes of strategy=ddp would run the whole sweep" in done.stderr


@pytest.mark.parametrize("setting", ["seed=${nope}", "name=[", "seed=1,2", "~seed", "seed.x=1", "seed=true", "name=''"])
def test_what_cannot_be_looked_up_is_none_of_the_settings_of_a_finished_run(setting, tmp_path):
    (tmp_path / ".hydra").mkdir()
    (tmp_path / ".hydra" / "overrides.yaml").write_text("[seed=1]")
    (tmp_path / "config.yaml").write_text("seed: 1\nname: null\nwidth: 0.5\nempty: ''\n")
    assert setting in command_line([f"resume={tmp_path}", setting])  # Hydra says what is wrong with it
    (tmp_path / "summary.json").write_text("{}")
    with pytest.raises(ConfigError, match="is finished and did not run with"):
        command_line([f"resume={tmp_path}", setting])
    for same in ("seed=1", "++seed=1", "name=null", "width=5e-1", "empty=''", "empty="):
        assert same in command_line([f"resume={tmp_path}", same])
