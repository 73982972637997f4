"""Values that depend on where a channel stands: triangles of matrices, positions of extremes."""

import pytest
import torch
from torch import nn

from actprune import trace
from actprune.pruning.plans import draft
from actprune.surgery import cut
from masked import difference, masked, outputs, random_units


class Triangle(nn.Module):
    """A triangular map between hidden channels, square or not, from its diagonal or from beside it."""

    def __init__(self, outer=8, diagonal=0, upper=False):
        super().__init__()
        self.embed, self.head = nn.Linear(5, 8), nn.Linear(outer, 3)
        self.weight, self.diagonal, self.part = nn.Parameter(torch.randn(8, outer)), diagonal, [torch.tril, torch.triu][upper]

    def forward(self, x):
        return self.head(self.embed(x).relu() @ self.part(self.weight, self.diagonal))


@pytest.mark.parametrize(("diagonal", "upper"), [(0, False), (-1, False), (0, True), (1, True)])
def test_rows_and_columns_of_a_triangle_leave_together(diagonal, upper):
    torch.manual_seed(0)
    model, x = Triangle(8, diagonal, upper).double(), torch.randn(4, 5, dtype=torch.float64)
    graph = trace(model, x)
    (group,) = graph.unlocked
    assert {("weight", 0), ("weight", 1)} <= set(group.members)
    for seed in range(3):
        twin = Triangle(8, diagonal, upper).double()
        twin.load_state_dict(model.state_dict())
        plan = draft(twin, graph, random_units(graph, seed))
        reference = outputs(masked(twin, plan, graph), x)
        cut(twin, plan, x)
        assert difference(outputs(twin, x), reference) < 1e-11


@pytest.mark.parametrize("settings", [(9, 0, False), (8, 1, False), (8, -2, False), (8, -1, True)])
def test_other_triangles_are_locked(settings):
    model = Triangle(*settings)
    graph = trace(model, torch.randn(4, 5))
    assert not graph.unlocked
    assert any("triangle of a matrix" in (group.locked or "") for group in graph.groups)


class Loudest(nn.Module):
    """The largest channel, and which one it was."""

    def __init__(self, reads):
        super().__init__()
        self.embed, self.table, self.head, self.reads = nn.Linear(5, 8), nn.Embedding(8, 8), nn.Linear(8, 3), reads

    def forward(self, x):
        x = self.embed(x)
        most, which = x.max(1, keepdim=True)
        return self.head(x.relu() * most + (self.table(which[:, 0]) if self.reads else 0))


@pytest.mark.parametrize("reads", [False, True])
def test_the_position_of_an_extreme_locks_once_it_is_read(reads):
    graph = trace(Loudest(reads), torch.randn(4, 5))
    reasons = [group.locked for group in graph.groups if ("head.weight", 1) in set(group.members)]
    assert len(reasons) == 1
    assert ("position of an extreme" in (reasons[0] or "")) == reads
