"""Every second or third channel: neighbours leave together, and what is left over or picked otherwise stays."""

import pytest
import torch
from torch import nn

from actprune.pruning.verify import rehearse
from masked import exact


class Between(nn.Module):
    """What is done to the channels of one layer before the next reads them."""

    def __init__(self, what, width, read):
        super().__init__()
        self.one, self.two, self.what = nn.Linear(6, width), nn.Linear(read, 5), what

    def forward(self, x):
        return self.two(self.what(self.one(x)))


def gate(h):
    return h[..., ::2].relu() * (h[..., 1::2] + 1)


def thirds(h):
    return h[..., ::3] * h[..., 1::3].sigmoid() - h[..., 2::3]


def written(h):
    """Both kinds are written where they were."""
    out = torch.empty_like(h)
    out[..., ::2], out[..., 1::2] = h[..., ::2].relu(), h[..., 1::2].tanh()
    return out


def turned(h):
    """Pairs are turned by their own angle, as complex numbers."""
    a, b = h[..., ::2], h[..., 1::2]
    return torch.stack((a * 0.6 - b * 0.8, a * 0.8 + b * 0.6), -1).flatten(-2)


@pytest.mark.parametrize(
    ("what", "width", "read", "units"),
    [
        (gate, 16, 8, 8),
        (thirds, 18, 6, 6),
        (turned, 16, 16, 8),
        (written, 16, 16, 8),
        (lambda h: h[..., ::2], 16, 8, 8),
        (lambda h: h[:, 1:16:2], 16, 8, 8),
    ],
    ids=["gate", "thirds", "turned", "written", "half of it", "to the end"],
)
def test_neighbours_leave_together(what, width, read, units):
    graph = exact(lambda: Between(what, width, read), torch.randn(3, 6).double())
    (group,) = graph.unlocked
    assert group.size == units


@pytest.mark.parametrize(
    ("what", "width", "read"),
    [
        (lambda h: h[..., ::3], 16, 6),
        (lambda h: h[..., 2::2], 16, 7),
        (lambda h: h[..., :14:2], 16, 7),
        (lambda h: h[..., :15:2], 16, 8),
    ],
    ids=["a rest", "begins later", "ends before", "ends at a number"],
)
def test_other_steps_lock(what, width, read):
    graph, _ = rehearse(Between(what, width, read).eval(), torch.randn(3, 6))
    assert not graph.unlocked
    assert any("slice" in group.locked for group in graph.groups)


def test_a_start_that_follows_the_width_stays():
    """``h[..., n // 8 - 1 :: 2]`` begins elsewhere once fewer are left, which no shape tells."""
    graph, _ = rehearse(Between(lambda h: h[..., h.shape[-1] // 8 - 1 :: 2], 16, 8).eval(), torch.randn(3, 6))
    assert not graph.unlocked


def test_channels_of_maps():
    def build():
        return nn.Sequential(nn.Conv2d(3, 12, 3), Picks(), nn.ReLU(), nn.Conv2d(6, 4, 3), nn.Flatten(), nn.Linear(36, 2))

    graph = exact(build, torch.randn(2, 3, 7, 7).double())
    assert sorted(group.size for group in graph.unlocked) == [4, 6]


class Picks(nn.Module):
    def forward(self, x):
        return x[:, ::2].square() + x[:, 1::2]
