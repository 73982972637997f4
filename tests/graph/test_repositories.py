"""Habits of public repositories of language, audio and time series models."""

import types
from dataclasses import dataclass

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import actprune
from actprune.pruning.plans import draft
from actprune.pruning.verify import rehearse
from actprune.surgery import cut
from masked import check_built, check_cuts, difference, outputs


@dataclass(frozen=True)
class Config:
    """Settings that all layers share."""

    n_head: int = 4
    inner_dim: int = 12
    n_layer: int = 2


class Attention(nn.Module):
    """Asks its settings for how many heads there are."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.qkv, self.out = nn.Linear(8, 24), nn.Linear(8, 8)

    def forward(self, x):
        b, n, c = x.shape
        q, k, v = self.qkv(x).view(b, n, 3, self.config.n_head, -1).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, scale=0.5)
        return self.out(y.transpose(1, 2).reshape(b, n, -1))


class Gate(nn.Module):
    """Splits by a width that stands in its settings."""

    def __init__(self, config):
        super().__init__()
        self.args = config
        self.inner, self.outer = nn.Linear(8, 24), nn.Linear(12, 8)

    def forward(self, x):
        x, gate = self.inner(x).split([self.args.inner_dim, self.args.inner_dim], -1)
        return self.outer(x * gate.sigmoid())


class Configured(nn.Module):
    def __init__(self, config=None):
        super().__init__()
        self.config = config or Config()
        self.stem, self.head = nn.Linear(5, 8), nn.Linear(8, 3)
        self.layers = nn.ModuleList(nn.Sequential(Attention(self.config), Gate(self.config)) for _ in range(2))

    def forward(self, x):
        x = self.stem(x)
        for attention, gate in self.layers:
            x = x + attention(x)
            x = x + gate(x)
        return self.head(x)


class Rotated(nn.Module):
    """Its heads are asked for by name, by a caller that goes past ``__call__``."""

    def __init__(self):
        super().__init__()
        self.n_local_heads, self.head_dim = 4, 2
        self.q, self.v, self.out = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x):
        b, n, _ = x.shape
        q, v = (f(x).view(b, n, self.n_local_heads, self.head_dim).transpose(1, 2) for f in (self.q, self.v))
        y = (q @ q.transpose(2, 3)).softmax(-1) @ v
        return self.out(y.transpose(1, 2).reshape(b, n, -1))


class Bypassed(nn.Module):
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.n_heads, self.attention, self.norm = 4, Rotated(), nn.LayerNorm(8)

        def forward(self, x):
            return x + self.attention.forward(self.norm(x))

    def __init__(self):
        super().__init__()
        self.stem, self.blocks, self.head = nn.Linear(5, 8), nn.Sequential(self.Block(), self.Block()), nn.Linear(8, 3)

    def forward(self, x):
        return self.head(self.blocks(self.stem(x)))


class Gated(nn.Module):
    """One integer says how wide the stream, its gates and what is passed on to the head are."""

    def __init__(self, as_tensor):
        super().__init__()
        self.hidden_channels, self.as_tensor = 6, as_tensor
        self.gates = nn.ModuleList(nn.Conv1d(6, 12, 3, padding=1) for _ in range(2))
        self.rests = nn.ModuleList(nn.Conv1d(6, 12 if n == 0 else 6, 1) for n in range(2))

    def forward(self, x):
        skipped, n = torch.zeros_like(x), self.hidden_channels
        for gates, rest in zip(self.gates, self.rests, strict=True):
            y, inner = gates(x), torch.IntTensor([n])[0].item() if self.as_tensor else n
            y = rest(y[:, :inner].tanh() * y[:, inner:].sigmoid())
            if y.shape[1] > n:
                x, skipped = x + y[:, :n], skipped + y[:, n:]
            else:
                skipped = skipped + y
        return skipped


def waves(as_tensor):
    return lambda: nn.Sequential(nn.Conv1d(5, 6, 1), Gated(as_tensor), nn.Conv1d(6, 3, 1))


class Normed(nn.Module):
    """Norms by functions, in layers whose weights have lengths and directions."""

    def __init__(self):
        super().__init__()
        self.first = torch.nn.utils.weight_norm(nn.Conv1d(5, 8, 3, padding=1))
        self.second = torch.nn.utils.weight_norm(nn.ConvTranspose1d(8, 6, 3, padding=1))
        self.gamma, self.beta, self.head = nn.Parameter(torch.rand(8)), nn.Parameter(torch.rand(8)), nn.Conv1d(6, 3, 1)

    def forward(self, x):
        x = F.layer_norm(self.first(x).transpose(1, 2), (self.gamma.shape[0],), self.gamma, self.beta)
        return self.head(self.second(x.transpose(1, 2)).relu())


@torch.no_grad()
def normed():
    model = Normed()
    model(torch.zeros(1, 5, 7))  # weights that stand in a graph cannot be copied
    return model


TOKENS, SOUND = torch.randn(2, 4, 5, dtype=torch.float64), torch.randn(2, 5, 7, dtype=torch.float64)
CASES = {
    "settings": (Configured, TOKENS, [4, 4, 8, 12, 12]),
    "past the call": (Bypassed, TOKENS, [4, 4, 8]),
    "one integer, several widths": (waves(False), SOUND, [6]),
    "the same, by a tensor": (waves(True), SOUND, [6]),
    "weight norms": (normed, SOUND, [6, 8]),
}


@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
@pytest.mark.parametrize("case", CASES)
def test_cut_equals_masked(case):
    check_built(*CASES[case])


def test_settings_of_a_module_are_its_own_once_they_change(tmp_path):
    torch.manual_seed(0)
    model, fresh = Configured(Config()), Configured(Config())
    shared = model.config
    random, budget = actprune.criteria.Random(), actprune.Budget(params=0.5)
    actprune.prune(model, TOKENS.float(), criterion=random, budget=budget, compensation=None)
    heads = [attention.config.n_head for attention, _ in model.layers]
    widths = [gate.args.inner_dim for _, gate in model.layers]
    assert [attention.qkv.out_features for attention, _ in model.layers] == [6 * n for n in heads]
    assert [gate.outer.in_features for _, gate in model.layers] == widths
    assert min(heads + widths) < 4
    assert model.config is shared == Config()
    actprune.save_pruned(model, tmp_path / "pruned.pt")
    actprune.load_pruned(fresh, tmp_path / "pruned.pt")
    assert difference(outputs(fresh, TOKENS.float()), outputs(model, TOKENS.float())) == 0


class Summed(nn.Module):
    """What stands between a layer and a sum over its units."""

    def __init__(self, between):
        super().__init__()
        self.inner, self.at, self.out, self.between = nn.Linear(5, 8), nn.Conv1d(4, 6, 1), nn.Linear(6, 3), between
        self.other = nn.Linear(8, 3)

    def forward(self, x):
        x = self.inner(x)
        return self.out(self.between(self, x).sum(-1)) + self.other(x).mean(1)


SUMS = {
    "biased at every position": (lambda m, x: m.at(x).relu(), False),
    "linear at every position": (lambda m, x: F.conv1d(x, m.at.weight).relu(), True),
    "sigmoid": (lambda m, x: F.conv1d(x.sigmoid(), m.at.weight), False),
    "product with a sigmoid": (lambda m, x: F.conv1d(x * x.sigmoid(), m.at.weight), True),
    "what is not positive": (lambda m, x: F.conv1d((x <= 0).to(x.dtype), m.at.weight), False),
    "softplus in part": (lambda m, x: F.conv1d(torch.cat([x[:, :2], F.softplus(x[:, 2:])], 1), m.at.weight), False),
}


@pytest.mark.parametrize("case", SUMS)
def test_a_sum_over_units_that_leave_no_zeros_keeps_them(case):
    between, leaves = SUMS[case]

    def build():
        return Summed(between)

    graph, _ = rehearse(build().double(), TOKENS)
    if leaves:
        assert graph.group("inner").locked is None, str(graph)
        check_cuts(build, graph, TOKENS)
    else:
        assert "summed where what has left would not be zero" in str(graph.group("inner").locked), str(graph)


def test_sparse_buffers_are_put_back():
    model = nn.Sequential(nn.Linear(5, 8), nn.Linear(8, 3))
    model.register_buffer("heads", torch.eye(3).to_sparse(), persistent=False)
    graph, _ = rehearse(model, TOKENS.float())
    cut(model, draft(model, graph, {"0": [1, 2]}), TOKENS.float())
    assert model[0].out_features == 6
    assert torch.equal(model.heads.to_dense(), torch.eye(3))


def test_a_method_hides_what_holds_the_parameters():
    class Hidden(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = types.SimpleNamespace(first=nn.Linear(5, 8), second=nn.Linear(8, 3))
            held = [*self.layers.first.parameters(), *self.layers.second.parameters()]
            self.parameters = nn.ParameterList(held)

        def forward(self, x):
            return self.layers.second(self.layers.first(x))

    graph, _ = rehearse(Hidden(), TOKENS.float())
    assert not graph.unlocked
    assert "which a method of that name hides" in str(graph)
