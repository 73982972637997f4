"""Widths that code takes for equal: reshapes to the shape of the input, heads that share out the stream, learned tokens."""

import pytest
import torch
from torch import nn

from actprune.pruning.plans import draft
from actprune.pruning.verify import rehearse
from actprune.surgery import cut
from masked import check_cuts, difference, masked, outputs, random_units


class TokensOfAMap(nn.Module):
    """Attention over the positions of a map, reshaped to the map's own shape, channels first."""

    def __init__(self, width=12, heads=2):
        super().__init__()
        self.heads = heads
        self.qkv, self.out = nn.Linear(width, 3 * heads * 4), nn.Linear(heads * 4, width)

    def forward(self, x):
        batch, channels, height, width = x.shape
        q, k, v = self.qkv(x.flatten(2).transpose(1, 2)).chunk(3, -1)
        q, k, v = (z.unflatten(-1, (self.heads, -1)).transpose(1, 2) for z in (q, k, v))
        y = (q @ k.transpose(-1, -2) / 2).softmax(-1) @ v
        return self.out(y.transpose(1, 2).flatten(2)).transpose(1, 2).reshape(batch, channels, height, width)


class AmongConvolutions(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.attention, self.head = nn.Conv2d(3, 12, 1), TokensOfAMap(), nn.Conv2d(12, 2, 1)

    def forward(self, x):
        return self.head(self.attention(self.stem(x).relu()))


class SharedOut(nn.Module):
    """Causal attention that splits by the width it keeps, and shares the stream's width out among its heads."""

    def __init__(self, n_embd=16, n_head=4):
        super().__init__()
        self.n_embd, self.n_head = n_embd, n_head
        self.c_attn, self.c_proj = nn.Linear(n_embd, 3 * n_embd), nn.Linear(n_embd, n_embd)
        self.register_buffer("bias", torch.tril(torch.ones(8, 8)).view(1, 1, 8, 8))

    def forward(self, x):
        b, t, c = x.size()
        q, k, v = (z.view(b, t, self.n_head, c // self.n_head).transpose(1, 2) for z in self.c_attn(x).split(self.n_embd, 2))
        scores = (q @ k.transpose(-2, -1) / k.size(-1) ** 0.5).masked_fill(self.bias[:, :, :t, :t] == 0, -1e9)
        return self.c_proj((scores.softmax(-1) @ v).transpose(1, 2).contiguous().view(b, t, c))


class Language(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.place = nn.Embedding(9, 16), nn.Embedding(8, 16)
        self.norms, self.attention = (
            nn.ModuleList(nn.LayerNorm(16) for _ in range(3)),
            nn.ModuleList([SharedOut(), SharedOut()]),
        )
        self.up, self.down, self.head = nn.Linear(16, 20), nn.Linear(20, 16), nn.Linear(16, 9)

    def forward(self, words):
        x = self.embed(words) + self.place(torch.arange(words.shape[1]))
        for norm, attention in zip(self.norms, self.attention, strict=False):
            x = x + attention(norm(x))
        return self.head(self.norms[2](x + self.down(self.up(x).relu())))


class InATransformer(nn.Module):
    """``nn.Transformer`` compares the width of what it is given with the one it was built for."""

    def __init__(self):
        super().__init__()
        self.embed, self.inner = nn.Linear(5, 12), nn.Transformer(12, 2, 1, 1, 16, batch_first=True)
        self.head = nn.Linear(12, 3)

    def forward(self, x):
        x = self.embed(x)
        return self.head(self.inner(x, x[:, :3]))


CASES = {
    "map": (AmongConvolutions, torch.randn(2, 3, 4, 4, dtype=torch.float64), {2, 12}),
    "shared out": (Language, torch.arange(12).view(2, 6) % 9, {4, 20}),
    "transformer": (InATransformer, torch.randn(2, 4, 5, dtype=torch.float64), {2, 12, 16}),
}


@pytest.mark.parametrize("case", CASES)
def test_cut_equals_masked(case):
    torch.manual_seed(0)
    build, x, sizes = CASES[case]
    model = build().double()
    graph, _ = rehearse(model, x)
    assert sizes <= {group.size for group in graph.unlocked}, str(graph)
    check_cuts(build, graph, x)


class Registers(nn.Module):
    """Learned tokens beside those that are given: a token at zero still takes its share of the softmax."""

    def __init__(self):
        super().__init__()
        self.tokens = nn.Parameter(torch.randn(1, 4, 8))
        self.embed, self.qkv, self.head = nn.Linear(5, 8), nn.Linear(8, 24), nn.Linear(8, 3)

    def forward(self, x):
        x = torch.cat([self.tokens.expand(len(x), -1, -1), self.embed(x)], 1)
        q, k, v = self.qkv(x).chunk(3, -1)
        return self.head((q @ k.transpose(1, 2)).softmax(-1) @ v).mean(1)


def test_learned_tokens_stay():
    graph, _ = rehearse(Registers(), torch.randn(2, 6, 5))
    assert not any(("tokens", 1) in group.members for group in graph.unlocked)
    assert any(("tokens", 2) in group.members for group in graph.unlocked)


class Shared(nn.Module):
    """Attention whose heads share out the width of its input: as many must leave from the one as from the other."""

    def __init__(self, width, heads):
        super().__init__()
        self.num_heads, self.qkv, self.proj = heads, nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x):
        b, n, c = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, self.num_heads, c // self.num_heads).permute(2, 0, 3, 1, 4)
        weights = (q @ k.transpose(-2, -1) * 0.5).softmax(-1)
        return x + self.proj((weights @ v).transpose(1, 2).reshape(b, n, c))


class Stages(nn.Module):
    def __init__(self, stages, heads):
        super().__init__()
        width = 4 * heads
        self.stem, self.head = nn.Linear(5, width), nn.Linear(width, 2)
        for i in range(stages):
            setattr(self, f"stage{chr(97 + i)}", nn.Sequential(Shared(width, heads), nn.Linear(width, width)))

    def forward(self, x):
        x = self.stem(x)
        for stage in list(self.children())[2:]:
            x = stage(x)
        return self.head(x.mean(1))


@pytest.mark.parametrize("heads", [2, 3, 4, 5])
def test_widths_that_stay_equal_by_chance_are_found_out(heads):
    """The stream of every stage leaves with the heads of its attention, the last one by itself."""
    torch.manual_seed(0)
    x = torch.randn(2, 4, 5, dtype=torch.float64)
    graph, _ = rehearse(Stages(6, heads).double(), x)
    assert len(graph.unlocked) == 7, str(graph)
    for seed in range(12):
        twin = Stages(6, heads).double()
        plan = draft(twin, graph, random_units(graph, seed))
        reference = outputs(masked(twin, plan, graph), x)
        cut(twin, plan, x)
        assert difference(outputs(twin, x), reference) < 1e-11
