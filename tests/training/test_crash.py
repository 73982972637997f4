"""kill -9 at any moment: the next run goes on, and ends with the network of the run that was left alone."""

import json

import pytest

import crashes
from processes import Fork, needs_fork

pytestmark = needs_fork


def killed(folder, kills, seed):
    done = Fork(crashes.main, folder, kills, seed, folder=folder).wait(timeout=1500)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_a_few_kills(tmp_path):
    found = killed(tmp_path, 4, seed=5)
    assert sum(found["kills"].values()) == 4
    assert found["difference"] == 0.0
    assert found["went_back"] > 0  # the guarded run does take a step back


@pytest.mark.slow
def test_fifty_kills(tmp_path):
    """With and without the quality guard, among them kills inside surgery and inside the writing of checkpoints."""
    found = killed(tmp_path, 50, seed=1)
    assert sum(found["kills"].values()) == 50
    assert min(found["kills"][moment] for moment in ("any", "surgery", "write", "rename")) >= 3
    assert found["difference"] == 0.0
