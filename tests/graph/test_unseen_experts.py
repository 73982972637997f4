"""Experts to which the example sends nothing, and splits by widths that are asked of the input."""

import pytest
import torch
from torch import nn

from actprune.pruning.plans import draft
from actprune.pruning.verify import rehearse
from actprune.surgery import cut
from masked import difference, masked, outputs, random_units


class Expert(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.up, self.norm, self.down = nn.Linear(width, 9), nn.BatchNorm1d(9), nn.Linear(9, width)

    def forward(self, x):
        return self.down(self.norm(self.up(x)).relu())


class Routed(nn.Module):
    """Every row goes to the expert that its last number names."""

    def __init__(self, named):
        super().__init__()
        experts = [Expert(8) for _ in range(4)]
        self.experts = nn.ModuleDict({f"expert {i}": e for i, e in enumerate(experts)}) if named else nn.ModuleList(experts)
        self.embed, self.head = nn.Linear(5, 8), nn.Linear(8, 3)

    def forward(self, x):
        to, x = x[:, 5].long(), self.embed(x[:, :5])
        out = torch.zeros_like(x)
        for i, expert in enumerate(self.experts.values() if isinstance(self.experts, nn.ModuleDict) else self.experts):
            rows = (to == i).nonzero().flatten()
            if len(rows):
                out = out.index_add(0, rows, expert(x[rows]))
        return self.head(x + out)


def rows(*to):
    return torch.cat([torch.randn(len(to), 5), torch.tensor(to)[:, None]], 1).double()


@pytest.mark.parametrize("named", [False, True])
def test_experts_that_the_example_does_not_reach_are_cut_like_the_others(named):
    torch.manual_seed(0)
    few, all_ = rows(1, 1, 2), rows(0, 1, 2, 3, 3, 2, 1, 0)
    model = Routed(named).double().eval()
    graph, _ = rehearse(model, few)
    assert sorted(group.size for group in graph.unlocked) == [8, 9, 9]
    for seed in range(3):
        twin = Routed(named).double().eval()
        plan = draft(twin, graph, random_units(graph, seed))
        reference = outputs(masked(twin, plan, graph), all_)
        cut(twin, plan, few)
        assert difference(outputs(twin, all_), reference) < 1e-11


class Modulated(nn.Module):
    """A projection is split into two parts of the input's width and gates."""

    def __init__(self, width, gates=3):
        super().__init__()
        self.inner, self.outer = nn.Conv2d(width, 2 * width + gates, 1), nn.Conv2d(width, width, 1)

    def forward(self, x):
        width = x.shape[1]
        q, context, gates = self.inner(x).split((width, width, 3), 1)
        return x + self.outer(q * sum(context * gate.sigmoid() for gate in gates.split(1, 1)))


class Focal(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.body, self.head = nn.Conv2d(3, 8, 1), nn.ModuleList([Modulated(8), Modulated(8)]), nn.Linear(8, 2)

    def forward(self, x):
        x = self.stem(x)
        for part in self.body:
            x = part(x)
        return self.head(x.mean((2, 3)))


def test_parts_as_wide_as_the_input_follow_it():
    x = torch.randn(2, 3, 5, 5, dtype=torch.float64)
    torch.manual_seed(0)
    graph, _ = rehearse(Focal().double(), x)
    (group,) = graph.unlocked
    assert group.size == 8
    for seed in range(3):
        twin = Focal().double()
        plan = draft(twin, graph, random_units(graph, seed))
        reference = outputs(masked(twin, plan, graph), x)
        cut(twin, plan, x)
        assert difference(outputs(twin, x), reference) < 1e-11


class Literal(nn.Module):
    """Sizes that are numbers in the code, one of them by chance as large as the input."""

    def __init__(self):
        super().__init__()
        self.stem, self.up, self.head = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 20, 1), nn.Conv2d(12, 2, 1)

    def forward(self, x):
        x = self.stem(x)
        return self.up(x).split((8, 12), 1)[0].mean() + self.head(self.up(x).split((8, 12), 1)[1]) + x.mean()


def test_sizes_in_the_code_stay():
    graph, _ = rehearse(Literal(), torch.randn(2, 3, 5, 5))
    assert not any(("up.weight", 0) in group.members for group in graph.unlocked)
    assert any(("stem.weight", 0) in group.members for group in graph.unlocked)
