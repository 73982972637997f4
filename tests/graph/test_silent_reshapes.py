"""A reshape that infers an extent can take a wrong one without failing: rehearsals see it by shape."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from actprune.pruning.plans import draft
from actprune.pruning.verify import rehearse
from actprune.surgery import cut
from masked import difference, masked, outputs


class Unnamed(nn.Module):
    """Grouped queries; nothing in the names of the counts says that they count heads."""

    def __init__(self):
        super().__init__()
        self.n, self.m = 4, 2
        self.q, self.k, self.v, self.o = nn.Linear(8, 16), nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(16, 8)
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        b, t, _ = x.shape
        q = self.q(x).view(b, t, self.n, -1).transpose(1, 2)
        k, v = (f(x).view(b, t, self.m, -1).transpose(1, 2) for f in (self.k, self.v))
        y = F.scaled_dot_product_attention(q, k, v, enable_gqa=True).transpose(1, 2).flatten(2)
        return self.head(self.o(y).relu().mean(1))


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.rnn = nn.LSTM(4, 7, num_layers=2, batch_first=True, bidirectional=True)
        self.head = nn.Linear(14, 3)

    def forward(self, x):
        return self.head(self.rnn(x)[0].mean(1))


def check(model, example, sizes, units):
    graph, _ = rehearse(model, example)
    assert sorted(g.size for g in graph.unlocked) == sizes, str(graph)
    plan = draft(model, graph, units)
    reference, before = masked(model, plan), outputs(model, example)
    cut(model, plan, example)
    assert difference(outputs(model, example), outputs(reference, example)) < 1e-11
    assert difference(outputs(model, example), before) > 1e-3
    model.train()(example).sum().backward()


def test_head_counts_without_telling_names_follow():
    torch.manual_seed(0)
    check(Unnamed().double().eval(), torch.randn(2, 4, 8, dtype=torch.float64), [2, 8], {"q": [1], "o": [0, 5]})


def test_hidden_units_of_a_recurrent_layer_leave_in_all_layers_and_directions():
    torch.manual_seed(0)
    check(Recurrent().double().eval(), torch.randn(2, 5, 4, dtype=torch.float64), [7], {"rnn": [0, 3]})


class Tail(nn.Module):
    """Of two halves that leave together the second is read beside the rest; one unit of two is left in a rehearsal."""

    def __init__(self):
        super().__init__()
        self.inner, self.head = nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, x):
        h = self.inner(x).relu()
        return self.head(h) + h[:, 2:].sum(1, keepdim=True)


class First(Tail):
    def __init__(self):
        super().__init__()
        self.inner, self.head = nn.Linear(3, 6), nn.Linear(6, 2)

    def forward(self, x):
        h = self.inner(x).relu()
        return self.head(h) + h[:, :2].amax(1, keepdim=True)


@pytest.mark.parametrize("net", [Tail, First])
def test_bounds_in_the_code_are_seen_where_a_single_unit_is_left(net):
    graph, _ = rehearse(net().eval(), torch.randn(5, 3))
    assert not graph.unlocked, str(graph)
