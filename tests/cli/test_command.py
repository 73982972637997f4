"""run.py in a process of its own: exit codes, sweeps, messages."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

import actprune.cli  # noqa: F401
from actprune.core.errors import StorageError
from paths import ROOT
from processes import needs_fork, start_run_py


def test_sweep_goes_on_after_a_failed_job_and_exits_with_an_error(command, tmp_path):
    """Two good jobs around a bad one: both write their summary, the message is told, the exit code is not 0."""
    done = command("-m", "debug=fast", "budget.params=0.3,0.001,0.5", "pruner=magnitude", "data.batch_size=16")
    assert done.returncode == 1
    (sweep,) = (tmp_path / "runs" / "multirun").iterdir()
    summaries = {path.parent.name: json.loads(path.read_text()) for path in sweep.glob("*/summary.json")}
    assert {name: summary["budget"] for name, summary in summaries.items()} == {
        "0": {"params": 0.3},
        "2": {"params": 0.5},
    }
    assert all(summary["criterion"] == "magnitude" for summary in summaries.values())
    assert all((sweep / str(job) / ".hydra" / "overrides.yaml").exists() for job in range(3))
    assert "job 1 failed: " in done.stderr
    assert "BudgetError" in done.stderr
    assert "Traceback" not in done.stderr


def test_one_message_and_no_traceback(tmp_path):
    """In an interpreter of its own, as on the command line."""
    line = [sys.executable, str(ROOT / "run.py"), "debug=fast", "budget.params=1.5"]
    done = subprocess.run(line, cwd=tmp_path, capture_output=True, text=True, timeout=240)
    assert done.returncode == 1
    assert "params=1.5 must be a share left in (0, 1]" in done.stderr
    assert "Traceback" not in done.stderr
    assert len(done.stderr.splitlines()) <= 6


@pytest.mark.slow
def test_two_processes_end_as_one_does(tmp_path):
    line = [
        sys.executable,
        str(ROOT / "run.py"),
        "debug=fast",
        "trainer.devices=2",
        "trainer.strategy=ddp",
        "trainer.accelerator=cpu",
    ]
    done = subprocess.run(line, cwd=tmp_path, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    (summary,) = (tmp_path / "runs").glob("*/*/summary.json")
    assert json.loads(summary.read_text())["budget"] == {"params": 0.35}
    assert done.stdout.count("before and after") == 1


def test_configuration_can_be_seen_without_running(command, tmp_path):
    done = command("--cfg", "job", "--resolve", "seed=5")
    assert done.returncode == 0, done.stderr
    assert "seed: 5" in done.stdout
    assert "T_max: 25" in done.stdout


def test_a_folder_that_cannot_be_written_is_one_message(command, tmp_path):
    (tmp_path / "taken").write_text("a file")
    done = command("debug=fast", "paths.output_dir=taken/here", "logger=none")
    assert done.returncode == 1
    assert "NotADirectoryError: " in done.stderr
    assert "resume=" not in done.stderr  # nothing is there to go on with
    assert "Traceback" not in done.stderr
    assert (tmp_path / "taken").read_text() == "a file"


@pytest.mark.parametrize(("number", "name"), [(signal.SIGTERM, "SIGTERM"), (signal.SIGINT, "Ctrl-C")])
def test_signals_have_a_status_of_their_own_and_say_how_to_go_on(tmp_path, number, name):
    """In an interpreter of its own, as a scheduler or a person stops it."""
    line = [sys.executable, str(ROOT / "run.py"), "debug=fast", "trainer.max_epochs=10000", "logger=none", "hydra.run.dir=run"]
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job hands down that it is ignored
    process = subprocess.Popen(line, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        end = time.monotonic() + 200
        while not list((tmp_path / "run").rglob("*.ckpt")) and process.poll() is None and time.monotonic() < end:
            time.sleep(0.05)
        process.send_signal(number)
        _, said = process.communicate(timeout=100)
    finally:
        process.kill()
        signal.signal(signal.SIGINT, before)
    assert process.returncode == 128 + number, said
    assert f"stopped by {name}; resume={tmp_path / 'run'} goes on" in said.splitlines()
    assert "Traceback" not in said


@needs_fork
def test_an_interrupted_sweep_goes_on_as_a_whole(tmp_path):
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        line = ["-m", "debug=fast", "seed=1,2", "trainer.max_epochs=10000", "logger=none", "hydra.sweep.dir=many"]
        process = start_run_py(*line, folder=tmp_path)
        end = time.monotonic() + 200
        while not list((tmp_path / "many").rglob("*.ckpt")) and process.poll() is None and time.monotonic() < end:
            time.sleep(0.05)
        os.kill(process.pid, signal.SIGINT)
        done = process.wait(100)
    finally:
        signal.signal(signal.SIGINT, before)
    assert done.returncode == 128 + signal.SIGINT
    assert f"stopped by Ctrl-C; resume={tmp_path / 'many'} goes on" in done.stderr.splitlines()
    assert not (tmp_path / "many" / "1").exists()


def test_an_interrupt_that_broke_a_file_is_an_interrupt(monkeypatch):
    """torch fails to close the archive that it was writing, which looks like a full disk."""
    module = sys.modules["actprune.cli.main"]

    def job(config):
        try:
            try:
                raise KeyboardInterrupt
            finally:
                raise RuntimeError("unexpected pos")
        except RuntimeError as error:
            raise StorageError("could not be written") from error

    monkeypatch.setattr(module, "run_job", job)
    monkeypatch.setattr(module, "_stopped", lambda by, number, config: SystemExit(128 + number))
    with pytest.raises(SystemExit) as stopped:
        module._interruptible(None)
    assert stopped.value.code == 130
