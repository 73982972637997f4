import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from actprune.training import RandomState


def draw():
    return random.random(), float(np.random.rand()), float(torch.rand(()))


def test_generators_go_on_where_the_checkpoint_was_written(tmp_path):
    draw()
    torch.save(RandomState().state_dict(), tmp_path / "state.pt")
    expected = [draw(), draw()]
    RandomState().load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert [draw(), draw()] == expected


@pytest.mark.parametrize(("then", "now"), [(1, 2), (2, 1), (3, 2)])
def test_another_number_of_processes_is_told_and_keeps_its_own(then, now, caplog):
    callback = RandomState()
    one = callback.state_dict()
    expected, again = draw(), RandomState()
    again.load_state_dict(one)
    callback.setup(SimpleNamespace(world_size=now, global_rank=0), None, "fit")
    callback.load_state_dict(one if then == 1 else {"processes": [one] * then})
    assert draw() == expected  # as the state before it was, not set back a second time
    assert f"the random state of {then} processes, this run has {now}" in caplog.text
    draw()
    caplog.clear()
    callback.setup(SimpleNamespace(world_size=now, global_rank=1), None, "fit")
    callback.load_state_dict(one if then == 1 else {"processes": [one] * then})
    assert draw() != expected
    assert not caplog.text


def test_old_checkpoints_without_a_state_are_fine():
    RandomState().load_state_dict({})
