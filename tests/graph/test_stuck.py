"""Where a search for repairs used to end: a lock in one place, shapes kept as tuples, what is broadcast within groups."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from actprune import trace
from actprune.pruning.shares import Shares, _pairs
from actprune.pruning.verify import rehearse
from masked import check_cuts


class RootMeanSquare(nn.Module):
    """A norm that asks for the shape it was built with."""

    def __init__(self, width):
        super().__init__()
        self.normalized_shape, self.weight = (width,), nn.Parameter(torch.rand(width))

    def forward(self, x):
        return F.rms_norm(x, self.normalized_shape, self.weight, 1e-6)


class Attention(nn.Module):
    def __init__(self, width, heads, head_dim):
        super().__init__()
        self.num_heads, self.head_dim, self.attn_dim = heads, head_dim, heads * head_dim
        self.qkv, self.proj = nn.Linear(width, 3 * self.attn_dim), nn.Linear(self.attn_dim, width)

    def forward(self, x):
        b, n, _ = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4).unbind(0)
        x = F.scaled_dot_product_attention(q, k, v)
        return self.proj(x.transpose(1, 2).reshape(b, n, self.attn_dim))


class KeptShape(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.norm, self.attention = nn.Linear(5, 12), RootMeanSquare(12), Attention(12, 4, 3)
        self.head = nn.Linear(12, 3)

    def forward(self, x):
        x = self.embed(x)
        return self.head(x + self.attention(self.norm(x))).mean(1)


class Literal(nn.Module):
    """A number in the code, which nothing can make follow, and behind it an attribute that can."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.width = nn.Linear(5, 8), nn.Linear(8, 10), 10
        self.third, self.head = nn.Linear(10, 6), nn.Linear(6, 3)

    def forward(self, x):
        x = self.first(x).relu().view(-1, 8)
        return self.head(self.third(self.second(x).relu().view(-1, self.width)).relu())


class GroupDeviation(nn.Module):
    """The deviation of every group of channels, expanded over the group."""

    def __init__(self):
        super().__init__()
        self.stem, self.head = nn.Conv2d(3, 12, 1), nn.Conv2d(12, 4, 1)

    def forward(self, x):
        x = self.stem(x)
        b, c, h, w = x.shape
        y = x.reshape(b, 3, c // 3, h, w)
        deviation = (y.var(dim=(2, 3, 4), keepdim=True) + 1e-5).sqrt().expand(y.shape).reshape(b, c, h, w)
        return self.head(x * x.sigmoid() / deviation).mean((2, 3))


class Dynamic(nn.Module):
    """One kernel per channel, computed from the input: samples stand among the channels."""

    def __init__(self):
        super().__init__()
        self.stem, self.kernels, self.mix, self.head = nn.Linear(5, 8), nn.Linear(5, 24), nn.Linear(8, 9), nn.Linear(9, 3)

    def forward(self, x):
        b, n, _ = x.shape
        y = self.stem(x).transpose(1, 2).reshape(1, b * 8, n)
        y = F.conv1d(y, self.kernels(x.mean(1)).reshape(b * 8, 1, 3), padding=1, groups=b * 8)
        return self.head(self.mix(y.reshape(b, 8, n).transpose(1, 2)).relu()).mean(1)


class AsAConvolution(nn.Module):
    """A linear layer's weight, viewed to two widths that the module keeps: one repair alone helps nothing."""

    def __init__(self, inner, outer):
        super().__init__()
        self.inner, self.outer, self.kernel = inner, outer, nn.Linear(3 * inner, outer)

    def forward(self, x):
        weight = self.kernel.weight.view(self.outer, 3, self.inner).transpose(1, 2)
        return F.conv1d(x.transpose(1, 2), weight, self.kernel.bias, padding=1).transpose(1, 2).relu()


class Delayed(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Linear(5, 8), AsAConvolution(8, 8), AsAConvolution(8, 8), AsAConvolution(8, 6), nn.Linear(6, 3))


class GatedByHeads(nn.Module):
    """A number in the code is as large as the head count, which does not count it."""

    def __init__(self):
        super().__init__()
        self.num_heads, self.embed = 4, nn.Linear(5, 24)
        self.gate, self.head = nn.Linear(6, 8), nn.Linear(24, 3)

    def forward(self, x):
        x = self.embed(x)
        heads = x.view(x.shape[:-1] + (self.num_heads, -1))
        gate = self.gate(heads).view(heads.shape[:-1] + (2, 4)).sum(-1).sigmoid()
        return self.head((heads * gate[..., :1] + gate[..., 1:]).flatten(-2))


class Stage(nn.Module):
    """Reshapes to its own output width, which it compares with its input width: where they are equal, neither follows."""

    def __init__(self, inner, outer):
        super().__init__()
        self.inner, self.outer, self.mix = inner, outer, nn.Linear(inner, inner)
        if inner != outer:
            self.project = nn.Linear(inner, outer)

    def forward(self, x):
        x = x + self.mix(x)
        return self.project(x).view(len(x), 2, -1, self.outer).amax(1) if self.inner != self.outer else x


class Stages(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Linear(5, 7), nn.Linear(13, 3)
        self.stages = nn.ModuleList([Stage(7, 7), Stage(7, 13), Stage(13, 13)])

    def forward(self, x):
        x = self.embed(x)
        for stage in self.stages:
            x = stage(x)
        return self.head(x)


class Maxout(nn.Module):
    """The larger of two pieces of every channel."""

    def __init__(self):
        super().__init__()
        self.stem, self.head = nn.Conv2d(3, 16, 1), nn.Linear(8, 3)

    def forward(self, x):
        x = self.stem(x)
        b, c, h, w = x.shape
        return self.head(x.view(b, c // 2, 2, h, w).max(2)[0].mean((2, 3)))


class Circular(nn.Module):
    """Padding writes into a tensor that nobody asked the widths of: samples lock no channel beside them."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv1d(5, 8, 3, padding=1, padding_mode="circular")
        self.time, self.head = nn.Linear(4, 4), nn.Linear(8, 3)

    def forward(self, x):
        x = self.time(self.conv(x.transpose(1, 2)))
        return self.head(x.transpose(1, 2)).mean(1)


class Pair(nn.Module):
    """A bilinear form of two widths."""

    def __init__(self):
        super().__init__()
        self.left, self.right = nn.Linear(5, 8), nn.Linear(5, 6)
        self.form, self.head = nn.Bilinear(8, 6, 7), nn.Linear(7, 3)

    def forward(self, x):
        x = x.mean(1)
        return self.head(self.form(self.left(x).relu(), self.right(x).relu()).relu())


class MixedKernels(nn.Module):
    """Kernels mixed by a softmax over them: as many stay."""

    def __init__(self):
        super().__init__()
        self.stem, self.mix, self.head = nn.Linear(5, 8), nn.Linear(8, 4), nn.Linear(6, 3)
        self.kernels = nn.Parameter(torch.randn(4, 6, 8))

    def forward(self, x):
        x = self.stem(x)
        weight = torch.einsum("bk,koi->boi", self.mix(x.mean(1)).softmax(-1), self.kernels)
        return self.head(torch.einsum("bni,boi->bno", x, weight)).mean(1)


class Modulated(nn.Module):
    """One kernel per sample, as a grouped convolution whose groups are the samples."""

    def __init__(self):
        super().__init__()
        self.stem, self.style, self.head = nn.Conv2d(3, 8, 1), nn.Linear(3, 8), nn.Conv2d(6, 3, 1)
        self.kernel = nn.Parameter(torch.randn(6, 8, 3, 3))

    def forward(self, x):
        b, _, h, w = x.shape
        weight = self.kernel[None] * self.style(x.mean((2, 3)))[:, None, :, None, None]
        weight = weight * (weight.pow(2).sum([2, 3, 4]) + 1e-8).rsqrt()[..., None, None, None]
        y = self.stem(x).reshape(1, -1, h, w)
        y = F.conv2d(y, weight.view(-1, *weight.shape[2:]), padding=1, groups=b)
        return self.head(y.reshape(b, -1, h, w).relu()).mean((2, 3))


TOKENS, IMAGE = torch.randn(2, 4, 5, dtype=torch.float64), torch.randn(2, 3, 4, 4, dtype=torch.float64)
CASES = {
    "kept shape": (KeptShape, TOKENS, {12, 4}),
    "literal": (Literal, TOKENS, {10, 6}),
    "group deviation": (GroupDeviation, IMAGE, {4}),
    "as a convolution": (Delayed, TOKENS, {8, 6}),
    "gated by heads": (GatedByHeads, TOKENS, {4}),
    "stages": (Stages, TOKENS, {7}),  # 13 might become 7, and nothing be reshaped
    "maxout": (Maxout, IMAGE, {8}),
    "circular": (Circular, TOKENS, {8}),
    "bilinear": (Pair, TOKENS, {8, 6, 7}),
    "mixed kernels": (MixedKernels, TOKENS, {6}),
    "modulated": (Modulated, IMAGE, {8, 6}),
    "dynamic": (Dynamic, TOKENS, {9}),
}


@pytest.mark.parametrize("case", CASES)
def test_cut_equals_masked(case):
    build, x, sizes = CASES[case]
    torch.manual_seed(0)
    graph, _ = rehearse(build().double(), x)
    assert sizes <= {group.size for group in graph.unlocked}, str(graph)
    check_cuts(build, graph, x)


class Deep(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Linear(5, 12), nn.Linear(12, 3)
        self.blocks = nn.ModuleList(Attention(12, 4, 3) for _ in range(24))

    def forward(self, x):
        x = self.embed(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def test_the_last_rehearsal_leaves_no_two_widths_equal():
    graph = trace(Deep(), torch.randn(1, 2, 5))
    shares, pairs = Shares(graph), _pairs(graph).values()
    gone = graph.removed({group.name: shares.of(len(shares) - 1, group) for group in graph.unlocked})
    assert len(pairs) >= 24
    assert all((~gone)[a].sum() != (~gone)[b].sum() for a, b in pairs)
