"""More habits of other people's code: shapes of slices, private widths, grids of integers, checks of values, positions."""

import pytest
import torch
from torch import nn
from torch.ao import quantization
from torch.nn import functional as F

from actprune.pruning.plans import draft
from actprune.pruning.verify import rehearse
from actprune.surgery import cut
from masked import check_built, check_cuts, difference, masked, outputs


class Timed(nn.Module):
    """A derivative in time: the moment is one more channel, made in the shape of the first."""

    def __init__(self):
        super().__init__()
        self.stem, self.mix, self.head = nn.Conv2d(3, 8, 1), nn.Conv2d(9, 8, 1), nn.Conv2d(8, 2, 1)

    def forward(self, x):
        x = self.stem(x)
        for t in (0.0, 0.5):
            x = x + self.mix(torch.cat([torch.ones_like(x[:, :1]) * t, x], 1)).tanh()
        return self.head(x)


class Gated(nn.Module):
    """A cell that splits by a width of its own, which is private."""

    def __init__(self):
        super().__init__()
        self._size, self.embed, self.head = 6, nn.Linear(5, 7), nn.Linear(6, 3)
        self.gates = nn.Linear(13, 18)

    def forward(self, x):
        x, h = self.embed(x), x.new_zeros(len(x), self._size)
        for t in range(x.shape[1]):
            r, c, u = torch.split(self.gates(torch.cat([x[:, t], h], -1)), [self._size] * 3, -1)
            h = torch.lerp(h, (r.sigmoid() * c).tanh(), u.sigmoid())
        return self.head(h)


class TwoStates(nn.Module):
    """Zeros of three widths: two that one number counts, which leave together, and one of its own."""

    def __init__(self):
        super().__init__()
        self.state_dim, self.context_dim = 6, 8
        self.embed, self.first, self.other = nn.Linear(5, 8), nn.Linear(14, 6), nn.Linear(12, 6)
        self.head = nn.Linear(14, 3)

    def forward(self, x):
        a, b = x.new_zeros(len(x), self.state_dim), torch.zeros(len(x), self.state_dim, dtype=x.dtype)
        x, context = self.embed(x), x.new_zeros(len(x), self.context_dim)
        for t in range(x.shape[1]):
            a = self.first(torch.cat([a, context], -1)).tanh()
            b = self.other(torch.cat([a, b], -1)).tanh()
            context = x[:, t] * b.mean(-1, keepdim=True)
        return self.head(torch.cat([b, context], -1))


class RelativeHeads(nn.Module):
    """What is called the head's width is not the number of heads, whichever comes first."""

    def __init__(self):
        super().__init__()
        self.d_head, self.num_heads = 3, 4
        self.q, self.k, self.v, self.out = nn.Linear(5, 12), nn.Linear(5, 12), nn.Linear(5, 12), nn.Linear(12, 3)

    def forward(self, x):
        b, n, _ = x.shape
        q, k, v = (f(x).view(b, n, self.num_heads, self.d_head).transpose(1, 2) for f in (self.q, self.k, self.v))
        y = (q @ k.transpose(2, 3) * 0.5).softmax(-1) @ v
        return self.out(y.transpose(1, 2).reshape(b, n, -1))


class OnAGrid(nn.Module):
    """Activations and weights are rounded to grids, one for all or one per channel."""

    def __init__(self):
        super().__init__()
        self.inner, self.outer = nn.Linear(5, 12), nn.Linear(12, 3)
        self.register_buffer("scale", torch.rand(12) / 10 + 0.1)
        self.register_buffer("zero", torch.zeros(12, dtype=torch.int32))

    def forward(self, x):
        weight = torch.fake_quantize_per_channel_affine(self.inner.weight, self.scale, self.zero, 0, -128, 127)
        x = F.linear(x, weight, self.inner.bias).relu()
        return self.outer(torch.fake_quantize_per_tensor_affine(x, 0.05, 0, -128, 127))


class Latent(nn.Module):
    """A distribution, whose parameters PyTorch checks."""

    def __init__(self):
        super().__init__()
        self.mean, self.spread, self.head = nn.Linear(5, 8), nn.Linear(5, 8), nn.Linear(8, 3)

    def forward(self, x):
        drawn = torch.distributions.Normal(self.mean(x), F.softplus(self.spread(x)) + 0.1)
        return self.head(drawn.mean + drawn.stddev)


class Correlated(nn.Module):
    """Correlation in time, by Fourier transforms, of every channel with another one."""

    def __init__(self):
        super().__init__()
        self.left, self.right, self.head = nn.Linear(5, 8), nn.Linear(5, 8), nn.Linear(8, 3)

    def forward(self, x):
        left, right = (torch.fft.rfft(f(x).transpose(1, 2)) for f in (self.left, self.right))
        return self.head(torch.fft.irfft(left * torch.conj(right), n=x.shape[1]).transpose(1, 2))


class Ensemble(nn.Module):
    """Members side by side, by ``torch.func``."""

    def __init__(self):
        super().__init__()
        self.stem, self.members, self.out = nn.Linear(5, 8), nn.Parameter(torch.randn(3, 7, 8)), nn.Linear(7, 3)

    def forward(self, x):
        x = self.stem(x).relu()
        return torch.func.vmap(self.out)(torch.func.vmap(lambda w: F.linear(x, w))(self.members).relu()).mean(0)


class NormedHeads(nn.Module):
    """A norm over every head, as a norm over groups."""

    def __init__(self):
        super().__init__()
        self.n_head, self.embed = 4, nn.Linear(5, 8)
        self.q, self.k, self.v, self.out = nn.Linear(8, 12), nn.Linear(8, 12), nn.Linear(8, 12), nn.Linear(12, 3)
        self.norm, self.each = nn.GroupNorm(4, 12), nn.GroupNorm(8, 8)

    def forward(self, x):
        x = self.each(self.embed(x).transpose(1, 2)).transpose(1, 2)
        b, n, _ = x.shape
        q, k, v = (f(x).view(b, n, self.n_head, -1).transpose(1, 2) for f in (self.q, self.k, self.v))
        y = (q @ k.transpose(2, 3) * 0.5).softmax(-1) @ v
        return self.out(self.norm(y.transpose(1, 2).reshape(b * n, -1))).view(b, n, -1)


class DeltaRule(nn.Module):
    """A state per head, zero at first, which an ``einsum`` reads before anything is written."""

    def __init__(self):
        super().__init__()
        self.n_head, self.width = 4, 3
        self.k, self.v, self.out = nn.Linear(5, 12), nn.Linear(5, 12), nn.Linear(12, 3)

    def forward(self, x):
        b, n, _ = x.shape
        k, v = (f(x).view(b, n, self.n_head, self.width) for f in (self.k, self.v))
        state, found = torch.zeros(b, self.n_head, self.width, self.width, dtype=x.dtype), []
        for t in range(n):
            error = v[:, t] - torch.einsum("bhij,bhj->bhi", state, k[:, t])
            state = state + torch.einsum("bhi,bhj->bhij", error, k[:, t])
            found.append(torch.einsum("bhij,bhj->bhi", state, v[:, t]))
        return self.out(torch.stack(found, 1).flatten(2))


class Swish(nn.Module):
    def forward(self, x):
        return x * x.sigmoid()


TOKENS, IMAGE = torch.randn(2, 4, 5, dtype=torch.float64), torch.randn(2, 3, 4, 4, dtype=torch.float64)
CASES = {
    "timed": (Timed, IMAGE, [8]),
    "gated": (Gated, TOKENS, [6, 7]),
    "two states": (TwoStates, TOKENS, [6, 8]),
    "relative heads": (RelativeHeads, TOKENS, [4]),
    "normed heads": (NormedHeads, TOKENS, [4, 8]),
    "delta rule": (DeltaRule, TOKENS, [4]),
    "latent": (Latent, TOKENS, [8]),
    "correlated": (Correlated, TOKENS, [8]),
    "ensemble": (Ensemble, TOKENS, [7, 8]),
}


@pytest.mark.parametrize("case", CASES)
def test_cut_equals_masked(case):
    assert not check_built(*CASES[case]).unknown


@pytest.mark.filterwarnings("ignore:`torch.jit.script`")
def test_scripted_modules_run_as_parts_of_what_calls_them():
    def build():
        return nn.Sequential(nn.Linear(5, 8), torch.jit.script(Swish()), nn.Linear(8, 7), torch.jit.script(nn.Linear(7, 3)))

    graph, _ = rehearse(build().double(), TOKENS)
    assert [group.size for group in graph.unlocked] == [8], str(graph)
    assert "held by a scripted module" in str(graph)
    check_cuts(build, graph, TOKENS)


def test_what_is_rounded_to_a_grid_is_cut_exactly():  # PyTorch has it in float32 only
    graph, _ = rehearse(OnAGrid(), TOKENS.float())
    assert [group.size for group in graph.unlocked] == [12], str(graph)
    torch.manual_seed(0)
    model = OnAGrid()
    plan = draft(model, graph, {"inner": [1, 4, 5, 9]})
    reference = outputs(masked(model, plan, consumers_only=True), TOKENS.float())
    cut(model, plan, TOKENS.float())
    assert difference(outputs(model, TOKENS.float()), reference) < 1e-6


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("backend", ["x86", "qnnpack"])
def test_a_network_that_learns_to_be_quantised(backend):
    """Scales are one per channel of a weight, or one of all with an axis that is set nevertheless."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 12), nn.ReLU(), nn.Linear(12, 3)).train()
    model.qconfig = quantization.get_default_qat_qconfig(backend)
    model = quantization.prepare_qat(model)
    model(TOKENS.float())
    model.eval().apply(quantization.disable_observer)
    graph, _ = rehearse(model, TOKENS.float())
    assert [group.size for group in graph.unlocked] == [12], str(graph)
    plan = draft(model, graph, {"0": [1, 4, 5, 9]})
    reference = outputs(masked(model, plan, consumers_only=True), TOKENS.float())
    cut(model, plan, TOKENS.float())
    assert difference(outputs(model, TOKENS.float()), reference) < 1e-6


class Between(nn.Module):
    """What a function does between two layers."""

    def __init__(self, between):
        super().__init__()
        self.inner, self.outer, self.between = nn.Linear(5, 8), nn.Linear(8, 3), between

    def forward(self, x):
        return self.outer(self.between(self.inner(x)))


def softmax(x):
    e = torch.exp(x - x.amax(-1, keepdim=True))
    return e / e.sum(-1, keepdim=True)


def cumulative(x):
    """The norm of all channels so far, counted by positions: ``(B, T, C)``."""
    n = x.shape[-1]
    return x / (x.square().sum(-1).cumsum(1) / torch.arange(n, n * (x.shape[1] + 1), n)).sqrt().unsqueeze(-1)


@pytest.mark.parametrize(
    ("between", "reason"),
    [
        (softmax, "summed where what has left would not be zero"),
        (cumulative, "a number that follows a width"),
        (lambda x: x * x.topk(x.shape[-1] // 4, 1)[0].mean(1, keepdim=True), "a number that follows a width"),
        (lambda x: x[:, x.shape[-1] // 4 - 1].unsqueeze(1), "a number that follows a width"),
    ],
)
def test_a_width_stays_that_no_shape_tells(between, reason):
    graph, _ = rehearse(Between(between).double(), TOKENS)
    assert reason in (graph.group("inner").locked or ""), str(graph)
