"""Concatenations that begin with all of the one before, or almost: cut == masked, whatever happened in between."""

import numpy as np
import pytest
import torch
from torch import nn

from actprune import trace
from actprune.graph.ids import FIXED, FREE, IdSpace
from actprune.pruning.verify import rehearse
from masked import check_cuts


def plain(x, found):
    return torch.cat([x, *found], 1)


def flipped(x, found):
    """Begins with another tensor of the same width."""
    return torch.cat([*found[:1], x, *found[1:]], 1) if len(found) % 2 else torch.cat([x, *found], 1)


def written(x, found):
    """What was concatenated before is another tensor's values by now."""
    joined = torch.cat([x, *found], 1)
    if len(found) == 2:
        found[0].copy_(found[1])
        joined = torch.cat([x, *found], 1)
    return joined


def without_detections(x, found):
    return torch.cat([x, torch.empty(0), *found], 1) if len(found) > 1 else torch.cat([x, *found], 1)


def as_rows(x, found):
    """Along another dimension first: the same tensors."""
    rows = torch.cat(found, 2).sum((1, 2, 3), keepdim=True) if found else 0
    return torch.cat([*found, x], 1) + rows


class Dense(nn.Module):
    def __init__(self, join, depth=4):
        super().__init__()
        self.join = join
        self.layers = nn.ModuleList(nn.Conv2d(3 + 6 * i, 6, 3, padding=1) for i in range(depth))
        self.head = nn.Conv2d(3 + 6 * depth, 5, 1)

    def forward(self, x):
        found = []
        for layer in self.layers:
            found.append(layer(self.join(x, found)).relu())
        return self.head(self.join(x, found)).mean((2, 3))


@pytest.mark.parametrize("join", [plain, flipped, written, without_detections, as_rows])
def test_cut_equals_masked(join):
    torch.manual_seed(0)
    x = torch.rand(2, 3, 5, 5, dtype=torch.float64)
    graph, _ = rehearse(Dense(join).double(), x)
    assert graph.unlocked, str(graph)
    if join in (plain, flipped, without_detections):
        assert [group.size for group in graph.unlocked] == [6] * 4
    check_cuts(lambda: Dense(join), graph, x, seeds=4)


def test_an_input_that_grew_in_place():
    class Grows(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Conv2d(2, 6, 1), nn.Conv2d(8, 6, 1)
            self.head = nn.Conv2d(15, 4, 1)

        def forward(self, x):
            y = self.a(x).relu()
            z = self.b(torch.cat([x, y], 1)).relu()
            x.resize_(x.shape[0], 3, *x.shape[2:])
            return self.head(torch.cat([x, y, z], 1))

    model = Grows()
    graph = trace(model, lambda m: m(torch.rand(2, 2, 4, 4)))
    assert {g.name: g.size for g in graph.unlocked} == {"a": 6, "b": 6}
    positions = graph.group("b").members["head.weight", 1].ravel()
    assert positions.tolist() == [9, 10, 11, 12, 13, 14]
    assert graph.group("a").members["head.weight", 1].ravel().tolist() == [3, 4, 5, 6, 7, 8]


def test_ties_last_when_ids_become_many():
    space = IdSpace()
    ids = space.fresh(1000)
    space.tie(ids[:10], ids[10:20], "")
    more = space.fresh(5000)
    space.tie(ids[:10], more[-10:], "")
    space.lock(more[:1], "why")
    found = space.find(np.array([FIXED, 15, FREE, int(more[-1]), int(more[0]), 999]))
    assert found.tolist() == [FIXED, 5, FREE, 9, int(more[0]), 999]
    assert space.reasons() == {int(more[0]): "why"}
