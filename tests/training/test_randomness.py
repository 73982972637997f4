import random

import numpy as np
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


def test_several_processes_keep_their_own(trainer):
    callback = RandomState()
    alone = callback.state_dict()
    trainer_of_two = type("Two", (), {"world_size": 2})()
    callback.setup(trainer_of_two, None, "fit")
    assert callback.state_dict() == {}
    expected = draw()
    callback.load_state_dict(alone)
    assert draw() != expected


def test_old_checkpoints_without_a_state_are_fine():
    RandomState().load_state_dict({})
