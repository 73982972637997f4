"""Modules whose code runs though nobody calls them: another one calls their ``forward``, or a method."""

import pytest
import torch
from torch import nn

from actprune.core.stack import module_stack
from masked import check_built


class Heads(nn.Module):
    """As published: nothing is called a head, and what weighs values is a module of its own."""

    def __init__(self, named):
        super().__init__()
        if named:
            self.num_heads, self.width = 4, 3
        else:
            self.h, self.d_k = 4, 3
        self.layers, self.weigh, self.out = nn.ModuleList(nn.Linear(12, 12) for _ in range(3)), Weighed(), nn.Linear(12, 12)

    def forward(self, x):
        h, d = (self.num_heads, self.width) if hasattr(self, "num_heads") else (self.h, self.d_k)
        q, k, v = (f(x).view(x.size(0), -1, h, d).transpose(1, 2) for f in self.layers)
        return self.out(self.weigh.forward(q, k, v).transpose(1, 2).contiguous().view(x.size(0), -1, h * d))


class Weighed(nn.Module):
    def __init__(self):
        super().__init__()
        self.dropout = nn.Dropout(0.1)

    def forward(self, q, k, v):
        return self.dropout((q @ k.transpose(-2, -1) * 0.5).softmax(-1)) @ v


class Halves(nn.Module):
    """A gate that splits by an integer of its own."""

    def __init__(self):
        super().__init__()
        self.inner_size, self.inner, self.outer = 8, nn.Linear(12, 16), nn.Linear(8, 12)

    def forward(self, x):
        x, gate = self.inner(x).split(self.inner_size, -1)
        return self.outer(x * gate.tanh())


class Residual(nn.Module):
    """Calls whatever it is given."""

    def __init__(self):
        super().__init__()
        self.norm, self.dropout = nn.LayerNorm(12), nn.Dropout(0.1)

    def forward(self, x, layer):
        return x + self.dropout(layer(self.norm(x)))


class Block(nn.Module):
    def __init__(self, named):
        super().__init__()
        self.attention, self.gate = Heads(named), Halves()
        self.first, self.second = Residual(), Residual()

    def forward(self, x):
        x = self.first(x, lambda y: self.attention.forward(y))
        return self.second(x, lambda y: self.gate.forward(y))


def lent(named):
    return lambda: nn.Sequential(nn.Linear(5, 12), Block(named), Block(named), nn.Linear(12, 3))


class Cell(nn.Module):
    """Says itself what it starts from."""

    def __init__(self, n, width):
        super().__init__()
        self.hidden_dim, self.gates = width, nn.Conv2d(n + width, 4 * width, 3, padding=1)

    def forward(self, x, state):
        h, c = state
        i, f, o, g = torch.split(self.gates(torch.cat([x, h], 1)), self.hidden_dim, 1)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        return o.sigmoid() * c.tanh(), c

    def init_hidden(self, x):
        h, w = x.shape[-2:]
        weight = self.gates.weight
        return tuple(torch.zeros(len(x), self.hidden_dim, h, w, dtype=weight.dtype) for _ in range(2))


class Recurrent(nn.Module):
    """Cells in a list, one above the other, whose first states their owner has them make."""

    def __init__(self, hold, widths):
        super().__init__()
        self.cells = hold([Cell(a, b) for a, b in zip((3, *widths), widths, strict=False)])
        self.head = nn.Conv2d(widths[-1], 2, 1)

    def forward(self, x):
        cells = list(self.cells.values() if isinstance(self.cells, nn.ModuleDict) else self.cells)
        states = [cell.init_hidden(x) for cell in cells]
        for t in range(x.shape[1]):
            y = x[:, t]
            for n, cell in enumerate(cells):
                states[n] = cell(y, states[n])
                y = states[n][0]
        return self.head(y)


def named(cells):
    return nn.ModuleDict({f"cell{n}": cell for n, cell in enumerate(cells)})


def recurrent(hold, *widths):
    return lambda: Recurrent(hold, widths)


FILM = torch.randn(1, 3, 3, 5, 5, dtype=torch.float64)
TOKENS = torch.randn(2, 6, 5, dtype=torch.float64)
CASES = {
    "a sibling's forward": (lent(named=False), TOKENS, [4, 4, 8, 8, 12]),
    "a sibling's forward, heads by name": (lent(named=True), TOKENS, [4, 4, 8, 8, 12]),
    "methods of cells in a list": (recurrent(nn.ModuleList, 8, 6), FILM, [6, 8]),
    "of equal cells": (recurrent(nn.ModuleList, 6, 6, 6), FILM, [6, 6, 6]),
    "of cells in a dict": (recurrent(named, 8, 6), FILM, [6, 8]),
    "of cells in a sequence": (recurrent(lambda cells: nn.Sequential(*cells), 8, 6), FILM, [6, 8]),
}


@pytest.mark.parametrize("case", CASES)
def test_cut_equals_masked(case):
    check_built(*CASES[case])


def test_the_stack_knows_what_runs_past_the_call():
    model, found = lent(named=False)().eval(), {}
    with module_stack(model) as stack:

        def hook(path):
            def note(*_):
                found.setdefault(path, {frame.path: frame.unseen for frame in stack if frame.unseen})

            return note

        for path in ("1.first.norm", "1.attention.layers.0", "1.attention.weigh.dropout", "1.gate.inner"):
            model.get_submodule(path).register_forward_pre_hook(hook(path))
        model(TOKENS.float())
    assert found == {
        "1.first.norm": {},
        "1.attention.layers.0": {"1.first": ["1.attention"]},
        "1.attention.weigh.dropout": {"1.first": ["1.attention.weigh", "1.attention"]},
        "1.gate.inner": {"1.second": ["1.gate"]},
    }
