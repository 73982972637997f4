"""Widths that stand in a list, one per layer: first states are made of them."""

import pytest
import torch
from torch import nn

import actprune
from actprune.pruning.verify import rehearse
from masked import check_cuts, difference, outputs


class Cell(nn.Module):
    def __init__(self, n, width):
        super().__init__()
        self.width, self.gates = width, nn.Linear(n + width, 3 * width)

    def forward(self, x, h):
        i, f, g = torch.split(self.gates(torch.cat([x, h], -1)), self.width, -1)
        return f.sigmoid() * h + i.sigmoid() * g.tanh()


class Stacked(nn.Module):
    """Layers one above the other."""

    def __init__(self, widths):
        super().__init__()
        self.num_hidden = widths
        self.cells = nn.ModuleList(Cell(a, b) for a, b in zip((5, *widths), widths, strict=False))
        self.head = nn.Linear(widths[-1], 3)

    def forward(self, x):
        states = [x.new_zeros(len(x), width) for width in self.num_hidden]
        for t in range(x.shape[1]):
            y = x[:, t]
            for n, cell in enumerate(self.cells):
                y = states[n] = cell(y, states[n])
        return self.head(y)


class Zigzag(Stacked):
    """A memory runs through all layers and is as wide as the first, so that all widths are one."""

    def __init__(self, widths):
        super().__init__(widths)
        self.mix = nn.ModuleList(nn.Linear(2 * n, n) for n in widths)

    def forward(self, x):
        states = [torch.zeros(len(x), width, dtype=x.dtype) for width in self.num_hidden]
        memory = torch.zeros(len(x), self.num_hidden[0], dtype=x.dtype)
        for t in range(x.shape[1]):
            y = x[:, t]
            for n, cell in enumerate(self.cells):
                states[n] = cell(y, states[n])
                memory = torch.tanh(self.mix[n](torch.cat([states[n], memory], -1)))
                y = states[n] = states[n] + memory
        return self.head(y)


class Numbers(nn.Module):
    """What is no width stays, and one number may be two widths."""

    def __init__(self):
        super().__init__()
        self.layout = (6, 4, 6)  # width, steps, a divisor
        self.embed, self.first, self.other = nn.Linear(5, 7), nn.Linear(13, 6), nn.Linear(13, 6)
        self.head = nn.Linear(12, 3)

    def forward(self, x):
        width, steps, divisor = self.layout
        a, b = x.new_zeros(len(x), width), torch.zeros(len(x), width, dtype=x.dtype)
        x = self.embed(x)
        for t in range(steps):
            a = self.first(torch.cat([a, x[:, t]], -1)).tanh() / divisor
            b = self.other(torch.cat([b, x[:, t]], -1)).tanh()
        return self.head(torch.cat([a, b], -1))


TOKENS = torch.randn(2, 4, 5, dtype=torch.float64)
CASES = {
    "list": (lambda: Stacked([8, 6]), [6, 8]),
    "tuple": (lambda: Stacked((8, 6)), [6, 8]),
    "equal layers": (lambda: Stacked([6, 6, 6, 6]), [6, 6, 6, 6]),
    "one layer": (lambda: Stacked([6]), [6]),
    "tied by a memory": (lambda: Zigzag([6, 6, 6]), [6]),
    "numbers that are no widths": (Numbers, [6, 7]),
}


@pytest.mark.parametrize("case", CASES)
def test_cut_equals_masked(case):
    build, sizes = CASES[case]
    torch.manual_seed(0)
    graph, _ = rehearse(build().double(), TOKENS)
    assert sorted(group.size for group in graph.unlocked) == sizes, str(graph)
    check_cuts(build, graph, TOKENS)


@pytest.mark.parametrize("kind", [list, tuple])
def test_lists_follow_layer_by_layer(kind, tmp_path):
    torch.manual_seed(0)
    widths = kind([8, 6, 6])
    model, fresh = Stacked(widths), Stacked(kind([8, 6, 6]))
    random, budget = actprune.criteria.Random(), actprune.Budget(params=0.5)
    actprune.prune(model, TOKENS.float(), criterion=random, budget=budget, compensation=None)
    assert model.num_hidden == kind(cell.width for cell in model.cells)
    assert sum(model.num_hidden) < 20
    assert widths == kind([8, 6, 6])
    actprune.save_pruned(model, tmp_path / "pruned.pt")
    actprune.load_pruned(fresh, tmp_path / "pruned.pt")
    assert difference(outputs(fresh, TOKENS.float()), outputs(model, TOKENS.float())) == 0
