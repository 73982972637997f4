"""run.py in a process of its own: exit codes, sweeps, messages."""

import json
import signal
import subprocess
import sys
import time

from paths import ROOT


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


def test_sigterm_has_a_status_of_its_own_and_says_how_to_go_on(tmp_path):
    """In an interpreter of its own, as a scheduler stops it."""
    line = [sys.executable, str(ROOT / "run.py"), "debug=fast", "trainer.max_epochs=10000", "logger=none", "hydra.run.dir=run"]
    process = subprocess.Popen(line, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        end = time.monotonic() + 200
        while not list((tmp_path / "run").rglob("*.ckpt")) and process.poll() is None and time.monotonic() < end:
            time.sleep(0.05)
        process.terminate()
        _, said = process.communicate(timeout=100)
    finally:
        process.kill()
    assert process.returncode == 128 + signal.SIGTERM
    assert "stopped by SIGTERM; resume=" in said
    assert "Traceback" not in said
