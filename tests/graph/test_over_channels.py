"""Means, variances and extremes over a width that is cut: as if the channels had never been there, and checked as such."""

import dataclasses

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from actprune.pruning.plans import draft
from actprune.pruning.verify import rehearse
from actprune.surgery import cut
from masked import difference, masked, outputs, random_units
from zoo import Head, build, conv


class Response(nn.Module):
    """Global response normalisation (ConvNeXt V2): the mean of the channels' norms over space divides each of them."""

    def __init__(self, width):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(width)), nn.Parameter(torch.randn(width))

    def forward(self, x):
        norms = torch.linalg.vector_norm(x, dim=(1, 2), keepdim=True)
        return x + self.bias + self.weight * x * norms / (norms.mean(dim=-1, keepdim=True) + 1e-6)


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.norm = conv(3, 9), nn.LayerNorm(9)
        self.up, self.response, self.down = nn.Linear(9, 14), Response(14), nn.Linear(14, 9)
        self.head = Head(9)

    def forward(self, x):
        x = self.embed(x)
        y = self.down(self.response(F.gelu(self.up(self.norm(x.permute(0, 2, 3, 1))))))
        return self.head(x + y.permute(0, 3, 1, 2))


class Spatial(nn.Module):
    """Spatial attention (CBAM): where to look is read off the mean and the maximum over channels."""

    def __init__(self, act):
        super().__init__()
        self.body, self.gate, self.out, self.head = conv(3, 10), conv(2, 1), conv(10, 6), Head(6)
        self.act = act

    def forward(self, x):
        x = self.act(self.body(x))
        seen = torch.cat([x.mean(1, keepdim=True), x.max(1, keepdim=True).values], 1)
        return self.head(self.out(x * torch.sigmoid(self.gate(seen))))


class Others(nn.Module):
    """The other reductions, over one dimension, several and all, in a module's output too, one beside a cast."""

    def __init__(self):
        super().__init__()
        self.embed, self.norm, self.head = nn.Linear(5, 12), nn.LayerNorm(12), nn.Linear(12, 3)

    def forward(self, x):
        x = self.norm(self.embed(x))
        mean = x.double().square().mean(-1, keepdim=True).to(x.dtype)
        var, center = torch.var_mean(x, -1, keepdim=True, correction=0)
        spread = x.std((1, 2), keepdim=True) + x.flatten(1).mean(1)[:, None, None] + x.mean()
        ends = -x.square().amax(-1, keepdim=True) + x.square().amin(-1, keepdim=True) + torch.logsumexp(x, -1, keepdim=True)
        return self.head((x * mean + center) * var * spread + ends)


def below(x):
    """Nothing above zero: a removed channel is the largest."""
    return -x.square()


IMAGE, TOKENS = (2, 3, 8, 8), (2, 4, 5)
NETS = {
    "response": (Block, IMAGE, [9, 14]),
    "spatial": (lambda: Spatial(F.relu), IMAGE, [6, 10]),
    "spatial, all negative": (lambda: Spatial(below), IMAGE, [6, 10]),
    "others": (Others, TOKENS, [12]),
}


def made(name):
    """A net, an example, and the graph, which is traced in float32."""
    torch.manual_seed(0)
    build_it, shape, sizes = NETS[name]
    model, example = build_it().eval(), torch.randn(shape)
    graph, _ = rehearse(model, example)
    assert sorted(g.size for g in graph.unlocked) == sizes
    return model.double(), example.double(), graph


@pytest.mark.parametrize("name", NETS)
def test_cut_equals_the_reference_over_kept_channels(name):
    unaware = 0.0
    for seed in range(4):
        model, example, graph = made(name)
        plan = draft(model, graph, random_units(graph, seed))
        # what produces the removed channels may go on producing: they are read nowhere
        references = [masked(model, plan, graph, consumers_only=only) for only in (False, True)]
        plain = outputs(masked(model, plan), example)
        cut(model, plan, example)
        ours = outputs(model, example)
        for reference in references:
            assert difference(ours, outputs(reference, example)) < 1e-11, (seed, plan.removed)
        unaware = max(unaware, difference(ours, plain))
    assert unaware > 1e-4  # a zero more does matter to these nets


@pytest.mark.parametrize("tensor", ["up.weight", "response.weight", "down.weight"])
def test_a_wrong_cut_is_seen(tensor):
    model, example, graph = made("response")
    right = draft(model, graph, {"up": [0, 3, 4]})
    (dim,) = right.removed[tensor]
    wrong = dataclasses.replace(right, removed={**right.removed, tensor: {dim: [1, 3, 4]}})
    references = [masked(model, plan, graph) for plan in (right, wrong)]
    cut(model, wrong, example)
    for reference in references:
        assert difference(outputs(model, example), outputs(reference, example)) > 1e-3


def test_a_graph_that_errs_about_where_channels_stand_is_seen():
    model, example, graph = made("spatial")
    plan = draft(model, graph, {"body": [0, 3, 4]})
    extents = {
        key: (name, tuple(tuple(None if c is None else c[::-1] for c in dims) for dims in found))
        for key, (name, found) in graph.extents.items()
    }
    reference = masked(model, plan, dataclasses.replace(graph, extents=extents))
    cut(model, plan, example)
    assert difference(outputs(model, example), outputs(reference, example)) > 1e-3


def test_a_cut_that_divides_by_the_old_width_is_seen():
    model, example, graph = made("response")
    plan = draft(model, graph, {"up": [0, 3, 4]})
    reference = masked(model, plan, graph)
    cut(model, plan, example)
    model.response.weight.data *= 14 / 11  # what a mean over 14 would make of it
    assert difference(outputs(model, example), outputs(reference, example)) > 1e-3


def test_means_over_places_are_left_alone():
    model, example = build("ConvBn", 0, torch.float64)
    graph, _ = rehearse(model, example)
    plan = draft(model, graph, random_units(graph, 1))
    (ours,), (plain,) = outputs(masked(model, plan, graph), example), outputs(masked(model, plan), example)
    assert torch.equal(ours, plain)
