"""Weights that are computed from several parameters (adapters) or picked by a number (experts) are weights: channels leave."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrize

from actprune.pruning.verify import rehearse
from masked import check_cuts


class Adapted(nn.Module):
    """A linear layer whose weight is made of its own and of an adapter of three dimensions."""

    def __init__(self, inner, outer):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(outer, inner) * 0.3), nn.Parameter(torch.randn(outer))
        self.down, self.up = nn.Parameter(torch.randn(3, inner)), nn.Parameter(torch.randn(outer, 3))

    def forward(self, x):
        return F.linear(x, self.weight + self.up @ self.down * 0.5, self.bias)


class Factored(Adapted):
    def forward(self, x):
        return F.linear(x, self.up @ self.down, self.bias)


class Directed(Adapted):
    """A magnitude for every output (DoRA); what has no direction has none of it."""

    def __init__(self, inner, outer):
        super().__init__(inner, outer)
        self.magnitude = nn.Parameter(torch.rand(outer, 1) + 0.5)

    def forward(self, x):
        weight = self.weight + self.up @ self.down
        return F.linear(x, self.magnitude * weight / weight.norm(dim=1, keepdim=True).clamp(min=1e-6), self.bias)


class Hadamard(Adapted):
    """The product of two adapters, entry by entry (LoHa)."""

    def __init__(self, inner, outer):
        super().__init__(inner, outer)
        self.left, self.right = nn.Parameter(torch.randn(outer, 3)), nn.Parameter(torch.randn(3, inner))

    def forward(self, x):
        return F.linear(x, self.weight + (self.up @ self.down) * (self.left @ self.right), self.bias)


class Summed(Adapted):
    """The same by ``einsum``, which multiplies batches of one."""

    def forward(self, x):
        return torch.einsum("bi,oi->bo", x, self.weight + torch.einsum("or,ri->oi", self.up, self.down)) + self.bias


class LowRank(nn.Module):
    def __init__(self, outer, inner):
        super().__init__()
        self.down, self.up = nn.Parameter(torch.randn(3, inner)), nn.Parameter(torch.randn(outer, 3))

    def forward(self, weight):
        return weight + self.up @ self.down


def parametrized(inner, outer):
    layer = nn.Linear(inner, outer)
    return parametrize.register_parametrization(layer, "weight", LowRank(outer, inner))


LAYERS = {
    "added": Adapted,
    "alone": Factored,
    "directed": Directed,
    "multiplied": Hadamard,
    "by einsum": Summed,
    "parametrized": parametrized,
}
X = torch.rand(4, 5, dtype=torch.float64)


@pytest.mark.parametrize("case", LAYERS)
def test_what_an_adapted_layer_reads_can_leave(case):
    def build():
        layer = LAYERS[case]
        return nn.Sequential(layer(5, 16), nn.Tanh(), layer(16, 12), nn.ReLU(), layer(12, 3))

    torch.manual_seed(0)
    graph, _ = rehearse(build().double(), X)
    sizes = [group.size for group in graph.unlocked]
    assert [sizes.count(16), sizes.count(12)] == [1, 1], str(graph)
    assert sizes.count(3) == (6 if case == "multiplied" else 3), str(graph)
    check_cuts(build, graph, X, seeds=6, counts=case != "by einsum")  # which multiplies no matrices of a single channel


class Lifted(Adapted):
    """Of columns that have left something is there still, and what they read is not zero either."""

    def forward(self, x):
        return F.linear(x, F.softplus(self.weight + self.up @ self.down), self.bias)


def test_a_weight_that_is_not_zero_where_channels_have_left_locks_what_is_not_zero_either():
    torch.manual_seed(0)
    for between, leaves in ((nn.Sigmoid, False), (nn.Tanh, True)):

        def build(between=between):
            return nn.Sequential(nn.Linear(5, 8), between(), Lifted(8, 3))

        graph, _ = rehearse(build().double(), X)
        assert (graph.group("0").locked is None) == leaves, str(graph)
        if leaves:
            check_cuts(build, graph, X, seeds=6)


class Experts(nn.Module):
    """Every sample is multiplied by its expert's matrices."""

    def __init__(self, pick, width=12):
        super().__init__()
        self.pick, self.stem, self.gate = pick, nn.Linear(5, width), nn.Linear(width, 4)
        self.inner, self.bias = nn.Parameter(torch.randn(4, width, 16)), nn.Parameter(torch.randn(4, 16))
        self.outer, self.head = nn.Parameter(torch.randn(4, 16, width)), nn.Linear(width, 3)

    def forward(self, x):
        x = self.stem(x).relu()
        score, expert = self.gate(x).softmax(-1).max(-1)
        y = torch.bmm(x[:, None], self.pick(self.inner, expert)) + self.bias[expert][:, None]
        y = torch.bmm(y.relu(), self.pick(self.outer, expert))[:, 0]
        return self.head(y * score[:, None])


@pytest.mark.parametrize("pick", [lambda w, e: w[e], lambda w, e: w.index_select(0, e)])
def test_what_a_picked_matrix_reads_can_leave(pick):
    torch.manual_seed(0)
    graph, _ = rehearse(Experts(pick).double(), X)
    assert sorted(group.size for group in graph.unlocked) == [12, 12, 16], str(graph)
    check_cuts(lambda: Experts(pick), graph, X, seeds=6)


class Queries(nn.Module):
    """Learned queries are projected, which makes them products of parameters, and split into heads that nothing names."""

    def __init__(self):
        super().__init__()
        self.queries, self.stem = nn.Parameter(torch.rand(5, 12)), nn.Linear(5, 12)
        self.q, self.k, self.v, self.head = nn.Linear(12, 12), nn.Linear(12, 12), nn.Linear(12, 12), nn.Linear(12, 3)

    def forward(self, x):
        x = self.stem(x)
        q, k, v = self.q(self.queries)[None], self.k(x), self.v(x)
        q, k, v = (y.view(len(y), y.shape[1], -1, 4).transpose(1, 2) for y in (q, k, v))
        y = (q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5).softmax(-1) @ v
        return self.head(y.transpose(1, 2).flatten(2))


def test_projected_queries_are_no_weights_and_whole_heads_leave():
    torch.manual_seed(0)
    x = torch.rand(2, 7, 5, dtype=torch.float64)
    graph, _ = rehearse(Queries().double(), x)
    assert sorted(group.size for group in graph.unlocked) == [3, 12, 12], str(graph)
    check_cuts(Queries, graph, x, seeds=6)


class Table(nn.Module):
    """Rows of a table that are picked are tokens, which meet others: the width of their product stays."""

    def __init__(self):
        super().__init__()
        self.table, self.stem, self.head = nn.Parameter(torch.rand(9, 6)), nn.Linear(5, 6), nn.Linear(7, 3)

    def forward(self, x):
        return self.head(torch.bmm(self.stem(x), self.table[(9 * x[..., 0]).long()].transpose(1, 2)).tanh())


def test_picked_rows_are_no_weights():
    graph, _ = rehearse(Table(), torch.rand(2, 7, 5))
    assert "summed over between two activations" in str(graph.group("stem").locked), str(graph)
