"""Modules whose code runs though nobody calls them: another one calls their ``forward``, or a method."""

import pytest
import torch
from torch import nn

from actprune.core.stack import module_stack
from actprune.pruning.verify import rehearse
from masked import check_cuts


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


TOKENS = torch.randn(2, 6, 5, dtype=torch.float64)
CASES = {
    "a sibling's forward": (lent(named=False), TOKENS, [4, 4, 8, 8, 12]),
    "a sibling's forward, heads by name": (lent(named=True), TOKENS, [4, 4, 8, 8, 12]),
}


@pytest.mark.parametrize("case", CASES)
def test_cut_equals_masked(case):
    build, x, sizes = CASES[case]
    torch.manual_seed(0)
    graph, _ = rehearse(build().double(), x)
    assert sorted(group.size for group in graph.unlocked) == sizes, str(graph)
    check_cuts(build, graph, x)


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
