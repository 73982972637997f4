"""What has left is zero behind a product and not behind a sigmoid: sums over channels tell the difference."""

import pytest
import torch
from torch import nn
from torch.distributions import Normal, kl_divergence
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from actprune.pruning.plans import draft
from actprune.pruning.verify import rehearse
from masked import check_cuts

TOKENS = torch.randn(2, 6, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


class Between(nn.Module):
    """Something between two layers: ``(B, T, C) -> (B, T, C)``."""

    def __init__(self, between):
        super().__init__()
        self.between, self.inner, self.outer = between, nn.Linear(5, 8), nn.Linear(8, 3)

    def forward(self, x):
        return self.outer(self.between(self.inner(x)))


def over_memories(x):
    """External attention: a softmax over tokens, then shares over memories."""
    x = x.softmax(1)
    return x / (x.sum(-1, keepdim=True) + 1e-9)


def mixed(x):
    """Every operand of a product is positive, and a power, a transposition and a concatenation stand between."""
    p = torch.cat([F.softplus(x), 1 - x], 1).square().transpose(1, 2) * (x.mean((1, 2), keepdim=True).exp() + 1)
    return x / p.sum(1).mean(1)[:, None, None]


def each_by_itself(x):
    """A moving average of every channel."""
    return F.conv1d(x.transpose(1, 2), torch.ones(x.shape[-1], 1, 3).to(x), padding=1, groups=x.shape[-1]).transpose(1, 2)


def mean_and(total, n):
    """A mean by hand, and the sum once more."""
    return total / n + total


@pytest.mark.parametrize(
    "between",
    [
        over_memories,
        mixed,
        lambda x: x / x.sigmoid().sum(-1, keepdim=True),
        lambda x: F.normalize(x.cos(), dim=-1) * x,
        lambda x: x * torch.where(x > 0, x, 0.5).sum(-1, keepdim=True),
        lambda x: x * (x <= 0).sum(-1, keepdim=True),
        lambda x: x * F.hardtanh(x, 0.2, 1.0).sum(-1, keepdim=True),
        lambda x: x * F.pad(x.transpose(1, 2), (1, 1), value=1.0).sum((1, 2))[:, None, None],
        lambda x: x * F.conv1d(x.sigmoid().transpose(1, 2), torch.ones(1, x.shape[-1], 1).to(x)).transpose(1, 2),
        lambda x: x * each_by_itself(x.sigmoid()).sum(-1, keepdim=True),
        lambda x: x * mean_and(x.sigmoid().sum(-1, keepdim=True), x.shape[-1]),
        lambda x: x * x.sigmoid().sum(-1, keepdim=True) / x.shape[-1] ** 0.5,
        lambda x: x * torch.polar(x.exp(), x).real.sum(-1, keepdim=True),
    ],
)
def test_a_sum_of_what_is_not_zero_is_locked(between):
    graph, _ = rehearse(Between(between).double(), TOKENS)
    assert "summed where what has left would not be zero" in (graph.group("inner").locked or ""), str(graph)


@pytest.mark.parametrize(
    "between",
    [
        lambda x: x / (1 + F.gelu(x).square().sum(-1, keepdim=True)),
        lambda x: x * (x.sigmoid() * x).sum(-1, keepdim=True),
        lambda x: x * x.expm1().sum(-1, keepdim=True),
        lambda x: x * torch.where(x.mean(-1, keepdim=True) > 0, x, 0.0).sum(-1, keepdim=True),
        lambda x: x * torch.maximum(x, x.new_full(x.shape, 0.0)).sum(-1, keepdim=True),
        lambda x: torch.vmap(lambda y, scale: y * scale)(x, torch.ones(2)) * x.relu().sum(-1, keepdim=True),
        lambda x: x * x.masked_fill(x > 0.5, 0).sum(-1, keepdim=True),
        lambda x: x * F.relu6(x).sum(-1, keepdim=True),
        lambda x: x * each_by_itself(x).sum(-1, keepdim=True),
        lambda x: x * (torch.cat([x, torch.zeros_like(x)], 1).sum((1, 2), keepdim=True) + x.sigmoid()),
    ],
)
def test_a_sum_of_zeros_is_not(between):
    def net():
        return Between(between)

    graph, _ = rehearse(net().double(), TOKENS)
    assert graph.group("inner").locked is None, str(graph)
    check_cuts(net, graph, TOKENS)


class Averaged(nn.Module):
    """A mean over channels of what is not zero, by a number that the module keeps."""

    def __init__(self):
        super().__init__()
        self.width, self.inner, self.outer = 8, nn.Linear(5, 8), nn.Linear(8, 3)

    def forward(self, x):
        x = self.inner(x)
        return self.outer(x) * (x.sigmoid().sum(-1, keepdim=True) / self.width)


def test_the_number_that_makes_a_mean_has_to_follow():
    model = Averaged().double()
    graph, _ = rehearse(model, TOKENS)
    plan = draft(model, graph, {"inner": [0, 5, 6]})
    assert plan.attributes[""]["width"] == 5
    written = Between(lambda x: x * (x.sigmoid().sum(-1, keepdim=True) / 8))
    graph, _ = rehearse(written.double(), TOKENS)
    assert "makes no mean of" in graph.group("inner").locked


class Pair(nn.Module):
    """Something of two layers' outputs, a computed weight and rows that are learned, beside their product."""

    def __init__(self, between):
        super().__init__()
        self.between = between
        self.left, self.right, self.outer, self.last = nn.Linear(5, 8), nn.Linear(5, 8), nn.Linear(8, 3), nn.Linear(4, 2)
        self.weight, self.rows = nn.Parameter(torch.rand(4, 8)), nn.Parameter(torch.rand(6, 8))

    def forward(self, x):
        a, b = self.left(x), self.right(x)
        return self.outer(a * b), self.between(self, a, b)


def written(x, write):
    """A copy, into which something has been written."""
    x = x.clone()
    write(x)
    return x


def assign(position, value):
    return lambda x: x.__setitem__(position, value)


def total(f):
    """The sum over channels of what a function makes of two."""
    return lambda m, a, b: f(a, b).sum(-1)


def normals(spread, other):
    return total(lambda a, b: kl_divergence(Normal(a, spread), Normal(b, other)))


def prior(a, b):
    """How far a latent distribution is from the normal one, by hand."""
    return 1 + b - a.pow(2) - b.exp()


def flat(x):
    return x.sigmoid().flatten(0, 1)


@pytest.mark.parametrize(
    "between",
    [
        lambda m, a, b: m.last(F.linear(F.softplus(a), F.softplus(m.weight))),
        lambda m, a, b: a.sigmoid() @ m.weight.exp().t(),
        lambda m, a, b: torch.einsum("bti,oi->bto", a.sigmoid(), m.weight.clamp(min=0.1)),
        lambda m, a, b: torch.cdist(a.sigmoid(), m.rows),
        lambda m, a, b: torch.cdist(a.sigmoid(), m.rows, p=1),
        lambda m, a, b: torch.mv(flat(a), b[0, 0].sigmoid()),
        lambda m, a, b: torch.dot(a[0, 0].sigmoid(), b[0, 0].sigmoid()),
        total(lambda a, b: a.sigmoid() - b.cos()),
        total(lambda a, b: (F.softplus(a) - b.sigmoid()).square()),
        total(lambda a, b: (a.sigmoid() != b.cos()).double()),
        total(lambda a, b: (a.sigmoid() < b.cos()).double()),
        total(lambda a, b: (a.sigmoid() == b.sigmoid()).double()),
        total(lambda a, b: a.sigmoid() - torch.ones_like(b)),
        total(lambda a, b: F.tanhshrink(a + 1)),
        lambda m, a, b: F.l1_loss(a.sigmoid(), b.cos(), reduction="sum"),
        normals(1.0, 2.0),
        total(lambda a, b: written(a, assign(0, 2.0))),
        total(lambda a, b: written(a, lambda x: x[:, :].add_(1))),
        total(lambda a, b: written(a, lambda x: x[::2].fill_(1))),
        total(lambda a, b: written(a, lambda x: x[0].copy_(b[0].sigmoid()))),
        total(lambda a, b: written(a, assign(torch.tensor([0]), 2.0))),
        total(lambda a, b: a.index_fill(0, torch.tensor([0]), 1.0)),
        total(lambda a, b: a.logsumexp(1)),
    ],
)
def test_a_sum_of_two_that_is_not_zero_is_locked(between):
    graph, _ = rehearse(Pair(between).double(), TOKENS)
    assert "summed where what has left would not be zero" in (graph.group("left").locked or ""), str(graph)


@pytest.mark.parametrize(
    "between",
    [
        lambda m, a, b: m.last(F.linear(a.sigmoid(), m.weight)),
        lambda m, a, b: m.last(F.linear(a, m.weight.exp())),
        lambda m, a, b: m.last(F.linear(a.sigmoid(), F.normalize(m.weight, dim=1))),
        lambda m, a, b: a.sigmoid() @ (m.weight * m.weight.sigmoid()).tanh().t(),
        lambda m, a, b: F.linear(a.sigmoid(), m.weight / m.weight.norm(dim=1, keepdim=True)),
        lambda m, a, b: ((a @ m.rows.t()).softmax(-1) @ m.rows.sigmoid() * b) @ m.weight.t(),
        lambda m, a, b: torch.cdist(a.relu(), m.rows),
        lambda m, a, b: torch.mv(flat(a), b[0, 0]),
        lambda m, a, b: F.layer_norm(a.sigmoid() - b.cos(), a.shape[-1:]) * b @ m.weight.t(),
        total(prior),
        normals(1.0, 1.0),
        total(lambda a, b: kl_divergence(Normal(a, (b / 2).exp()), Normal(0.0, 1.0))),
        total(lambda a, b: a.sigmoid() - b.sigmoid()),
        total(lambda a, b: torch.zeros_like(a) + (b.cos() - torch.ones_like(b))),
        total(lambda a, b: written(a, assign(0, 0.0))),
        total(lambda a, b: written(a, assign(torch.tensor([0]), 0.0))),
        total(lambda a, b: written(a, lambda x: x[:, 1:].add_(b[:, 1:]))),
        total(lambda a, b: written(a, lambda x: x[0].copy_(b[1]))),
        total(lambda a, b: torch.zeros_like(a).index_add(1, torch.arange(6), b)),
    ],
)
def test_a_sum_of_two_that_is_zero_is_not(between):
    def net():
        return Pair(between)

    graph, _ = rehearse(net().double(), TOKENS)
    assert graph.group("left").locked is None, str(graph)
    check_cuts(net, graph, TOKENS, counts=False)


@pytest.mark.parametrize("shaped", [lambda x: x.sum(-1, keepdim=True), lambda x: x.sum(-1)[..., None]])
def test_a_mean_by_hand_is_one_of_what_stays(shaped):
    def variance(x):
        x = x - x.mean(-1, keepdim=True)
        return x * shaped(x**2).div(x.shape[-1])

    graph, _ = rehearse(Between(variance).double(), TOKENS)
    assert graph.group("inner").locked is None, str(graph)


class RootOfMeanSquare(nn.Module):
    """A norm that asks its width of the input, and multiplies by the root; ``keep_only``: the reference's own count."""

    def __init__(self, width, early):
        super().__init__()
        self.weight, self.early, self.left, self.follows = nn.Parameter(torch.rand(width) + 0.5), early, 0, None

    def keep_only(self, gone):
        self.left = len(gone)

    def forward(self, x):
        root = (x.shape[-1] - self.left) ** 0.5
        x = F.normalize(x, dim=-1)
        return x * root * self.weight if self.early else x * self.weight * root


@pytest.mark.parametrize("early", [True, False])
def test_the_root_of_a_width_follows_a_norm_over_it(early):
    def net():
        return Between(RootOfMeanSquare(8, early))

    torch.manual_seed(0)
    graph, _ = rehearse(net().double(), TOKENS)
    assert graph.group("inner").locked is None, str(graph)
    check_cuts(net, graph, TOKENS)


@pytest.mark.parametrize(
    "between",
    [
        lambda x: x * x.shape[-1] ** 0.5,
        lambda x: F.normalize(x, dim=1) * x.shape[-1] ** 0.5,
        lambda x: F.normalize(x, dim=-1) * x.shape[-1],
    ],
)
def test_another_number_does_not(between):
    graph, _ = rehearse(Between(between).double(), TOKENS)
    assert "a number that follows a width" in (graph.group("inner").locked or ""), str(graph)


class Chosen(nn.Module):
    """Attention that chooses its kernel itself, which nobody from outside can keep from being fused."""

    def __init__(self, key_heads=4):
        super().__init__()
        self.heads, self.key_heads = 4, key_heads
        self.q, self.kv = nn.Linear(5, 12), nn.Linear(5, 6 * key_heads)
        self.out, self.head = nn.Linear(12, 7), nn.Linear(7, 2)

    def forward(self, x):
        b, n, _ = x.shape
        q = self.q(x).view(b, n, self.heads, 3).transpose(1, 2)
        k, v = self.kv(x).view(b, n, 2, self.key_heads, 3).permute(2, 0, 3, 1, 4)
        with sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]):
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=self.key_heads < self.heads)
        return self.head(self.out(y.transpose(1, 2).reshape(b, n, -1)))


@pytest.mark.parametrize("key_heads", [4, 2])
def test_attention_that_chooses_its_own_kernel(key_heads):
    graph, _ = rehearse(Chosen(key_heads).double(), TOKENS)
    assert graph.group("q").locked is None, str(graph)
    assert graph.group("q").size == key_heads
    check_cuts(lambda: Chosen(key_heads), graph, TOKENS, counts=False)


class Standardised(nn.Conv1d):
    """Its weight is standardised by a batch norm of the weight, as NFNets have it."""

    def forward(self, x):
        flat = self.weight.reshape(1, self.out_channels, -1)
        weight = F.batch_norm(flat, None, None, training=True, eps=1e-6).reshape_as(self.weight)
        return F.conv1d(x, weight, self.bias)


def test_weights_that_are_standardised_lock_nothing():
    model = nn.Sequential(
        nn.Conv1d(5, 8, 1), nn.ReLU(), Standardised(8, 6, 1), nn.ReLU(), Standardised(6, 7, 1), nn.Conv1d(7, 3, 1)
    )
    graph, _ = rehearse(model, torch.randn(2, 5, 4))
    assert sorted(group.size for group in graph.unlocked) == [6, 7, 8], str(graph)
