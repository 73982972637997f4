"""Habits of other people's code: shapes alone, checks of widths, tables in plain attributes, states beside logits."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from actprune import trace
from actprune.core.errors import TraceError
from actprune.pruning.plans import draft
from actprune.pruning.verify import rehearse
from actprune.surgery import cut
from masked import counted, difference, masked, outputs, random_units
from processes import apart, needs_operators_of_functions


class AsksForTheShape(nn.Module):
    """One channel is picked, and nobody reads its values."""

    def __init__(self, reads):
        super().__init__()
        self.embed, self.head, self.reads = nn.Linear(5, 12), nn.Linear(12, 3), reads

    def forward(self, x):
        x = self.embed(x)
        one = x[:, :, -1]
        y = self.head(x.relu()).mean(1)
        return y + one.mean() if self.reads else y * one.shape[1]


class Stage(nn.Module):
    def __init__(self, inner, outer):
        super().__init__()
        self.channels = inner
        self.conv = nn.Conv2d(inner, outer, 3)

    def forward(self, x):
        if x.shape[1] != self.channels:
            raise ValueError(f"expected {self.channels} channels")
        return self.conv(x).relu()


class Checks(nn.Sequential):
    """Every stage checks how many channels it is given; several widths are equal."""

    def __init__(self):
        super().__init__(Stage(3, 8), Stage(8, 8), Stage(8, 8), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3))


class Table(nn.Module):
    """A table that is neither parameter nor buffer."""

    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Linear(5, 12), nn.Linear(12, 3)
        self.positions = torch.randn(1, 4, 12)

    def forward(self, x):
        return self.head((self.embed(x) + self.positions).relu()).mean(1)


class Answers(nn.Module):
    """The stream is returned beside the logits."""

    def __init__(self, key):
        super().__init__()
        self.embed, self.head, self.key = nn.Linear(5, 12), nn.Linear(12, 3), key

    def forward(self, x):
        x = self.embed(x).relu()
        return {self.key: self.head(x), "last_hidden_state": x}


class Experts(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Linear(8, 32), nn.Linear(32, 3)
        self.up, self.down = nn.Parameter(torch.randn(4, 64, 32) / 6), nn.Parameter(torch.randn(4, 32, 64) / 8)

    def forward(self, x):
        x = self.embed(x)
        ends = torch.tensor([2, 3, 5, 6], dtype=torch.int32)
        inner = F.grouped_mm(x, self.up.transpose(1, 2), offs=ends).relu()
        return self.head(x + F.grouped_mm(inner, self.down.transpose(1, 2), offs=ends))


class WeightNorm(nn.Sequential):
    """Whole groups leave a convolution whose weight is computed."""

    def __init__(self):
        position = nn.utils.parametrizations.weight_norm(nn.Conv1d(12, 12, 3, padding=1, groups=4), dim=2)
        super().__init__(nn.Conv1d(5, 12, 3), position, nn.ReLU(), nn.Conv1d(12, 3, 2))


class CrossAttention(nn.Module):
    """Queries are not keys, keys are values: the packed weight is split in unequal parts."""

    def __init__(self):
        super().__init__()
        self.probe, self.embed = nn.Parameter(torch.randn(1, 2, 16)), nn.Linear(5, 16)
        self.attention, self.head = nn.MultiheadAttention(16, 4, batch_first=True), nn.Linear(16, 3)

    def forward(self, x):
        x = self.embed(x)
        return self.head(self.attention(self.probe.expand(len(x), -1, -1), x, x)[0]).mean(1)


class Bias(nn.Module):
    """Another module asks it for a table by a method; the table's shape is kept, heads last."""

    def __init__(self, positions, heads):
        super().__init__()
        self.num_heads, self.bias_shape = heads, (positions, positions, heads)
        self.table = nn.Parameter(torch.randn(positions * positions, heads))

    def get(self):
        return self.table.view(-1, self.num_heads).view(self.bias_shape).permute(2, 0, 1)


class BiasedAttention(nn.Module):
    """Heads are merged to the width of the input, whatever it is, and scaled by a vector that is viewed as itself."""

    def __init__(self, width, heads, positions):
        super().__init__()
        self.num_heads, self.head_dim, self.shape = heads, width // heads, (width,)
        self.qkv, self.proj, self.bias = nn.Linear(width, 3 * width), nn.Linear(width, width), Bias(positions, heads)
        self.scale = nn.Parameter(torch.rand(width))

    def forward(self, x):
        b, n, c = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4)
        attended = (q @ k.transpose(-2, -1) * 0.5 + self.bias.get()).softmax(-1) @ v
        return x * self.scale.view(self.shape) + self.proj(attended.transpose(1, 2).reshape(b, n, c))


class Biased(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Linear(5, 12), nn.Linear(12, 3)
        self.blocks = nn.Sequential(BiasedAttention(12, 3, 4), BiasedAttention(12, 3, 4))

    def forward(self, x):
        return self.head(self.blocks(self.embed(x))).mean(1)


MODELS = {
    "shape alone": (lambda: AsksForTheShape(reads=False), torch.randn(2, 4, 5)),
    "checks": (Checks, torch.randn(2, 3, 9, 9)),
    "table": (Table, torch.randn(2, 4, 5)),
    "answers": (lambda: Answers("logits"), torch.randn(2, 4, 5)),
    "experts": (Experts, torch.randn(6, 8)),
    "weight norm": (WeightNorm, torch.randn(2, 5, 8)),
    "cross attention": (CrossAttention, torch.randn(2, 4, 5)),
    "biased attention": (Biased, torch.randn(2, 4, 5)),
}


if not hasattr(F, "grouped_mm"):  # older PyTorch
    del MODELS["experts"]


@pytest.mark.parametrize("name", MODELS)
def test_every_inner_width_is_cut_exactly(name):
    build, example = MODELS[name]
    torch.manual_seed(0)
    model = build().eval()
    graph, _ = rehearse(model, example)
    inner = [g for g in graph.groups if "model's output" not in (g.locked or "") and g.size > 1]
    locked = [g for g in inner if g.locked]
    ends = [model.embed.in_features] if hasattr(model, "embed") else [example.shape[1]]
    assert len(inner) > len(locked)
    assert all(g.size in (*ends, 2, 4) for g in locked)  # inputs, probes and experts by number
    for seed in range(3):
        plan = draft(model, graph, random_units(graph, seed))
        reference = masked(model, plan)
        smaller = build()
        smaller.load_state_dict(model.state_dict())
        if name == "table":
            smaller.positions = model.positions.clone()
        smaller.eval()
        cut(smaller, plan, example)
        assert difference(outputs(smaller, example), outputs(reference, example)) < 1e-5
        assert counted(smaller, example) == (plan.params_after, plan.macs_after)


def test_a_value_that_is_read_locks_its_channels():
    graph = trace(AsksForTheShape(reads=True), torch.randn(2, 4, 5))
    assert any((g.locked or "").startswith("select on this dimension") for g in graph.groups if g.size == 12)


def test_a_state_without_logits_beside_it_is_the_output():
    graph = trace(Answers("pooled"), torch.randn(2, 4, 5))
    assert any("model's output" in (g.locked or "") for g in graph.groups if g.size == 12)


def test_a_function_of_the_model_says_what_is_read():
    x = torch.randn(2, 4, 5)
    graph = trace(Answers("pooled"), lambda model: model(x)["pooled"])
    assert [g.size for g in graph.unlocked] == [12]


@pytest.mark.parametrize("normed", [nn.utils.spectral_norm, nn.utils.parametrizations.spectral_norm])
def test_the_width_between_layers_of_spectral_norm_leaves(normed):
    torch.manual_seed(0)
    model = nn.Sequential(
        normed(nn.Conv2d(3, 6, 3)),
        nn.LeakyReLU(0.2),
        nn.Flatten(),
        normed(nn.Linear(54, 7)),
        nn.ReLU(),
        normed(nn.Linear(7, 2)),
    ).double()
    x = torch.randn(3, 3, 5, 5, dtype=torch.float64)
    graph, _ = rehearse(model, x)
    assert [group.size for group in graph.unlocked] == [6, 7]
    for seed in range(2):
        twin = copy.deepcopy(model).eval()
        plan = draft(twin, graph, random_units(graph, seed))
        full = copy.deepcopy(model).eval()
        tensors = dict(full.named_parameters()) | dict(full.named_buffers())
        with torch.no_grad():  # the norm is that of what stays: a zero row adds nothing to u'Wv
            for name, dims in plan.removed.items():
                for dim, gone in dims.items():
                    tensors[name].index_fill_(dim, torch.tensor(gone), 0)
        reference = outputs(full, x)
        cut(twin, plan, x)
        assert difference(outputs(twin, x), reference) < 1e-11


class Branching(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Linear(2, 4)

    def forward(self, x):
        return torch.cond(torch.tensor(True), lambda y: y + 1, lambda y: y - 1, (self.a(x),))


@needs_operators_of_functions
@apart
def test_operators_of_functions_are_not_followed():
    with pytest.raises(TraceError, match="cond runs functions that it is given, .* torch.where for torch.cond"):
        trace(Branching(), torch.ones(1, 2))
