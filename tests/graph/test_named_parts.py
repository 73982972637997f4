"""Splits in unequal parts by widths that modules keep, and convolutions along a dimension that they leave as it is."""

import pickle

import pytest
import torch
from torch import nn

from actprune.pruning.verify import rehearse
from masked import exact


def cuttable(graph):
    return {tensor for group in graph.unlocked for tensor, _ in group.members}


class Cascaded(nn.Module):
    """Queries, keys and values of every head, cut out of one convolution by widths of the module; of one head count as wide."""

    def __init__(self, width, key_dim=4, heads=4):
        super().__init__()
        self.key_dim, self.val_dim, self.num_heads = key_dim, 6, heads
        self.qkvs = nn.ModuleList(nn.Conv2d(width, 2 * key_dim + 6, 1) for _ in range(heads))
        self.proj = nn.Conv2d(6 * heads, width, 1)

    def forward(self, x):
        found = []
        for qkv in self.qkvs:
            q, k, v = (z.flatten(2) for z in qkv(x).split([self.key_dim, self.key_dim, self.val_dim], 1))
            weights = (q.transpose(1, 2) @ k * 0.5).softmax(-1)
            found.append((v @ weights.transpose(1, 2)).unflatten(2, x.shape[2:]))
        return self.proj(torch.cat(found, 1).relu())


class Partial(nn.Module):
    """One part passes through a convolution, the rest past it; the rest is what the module's width leaves, or the input's."""

    def __init__(self, width, part, of_the_input):
        super().__init__()
        self.dim, self.pdim = (None if of_the_input else width), part
        self.mix = nn.Conv2d(part, part, 3, padding=1)

    def forward(self, x):
        first, rest = x.split([self.pdim, (self.dim or x.shape[1]) - self.pdim], 1)
        return torch.cat([self.mix(first), rest], 1)


class Held(nn.Module):
    """Splits by a width that a module inside keeps."""

    class Cell(nn.Module):
        def __init__(self):
            super().__init__()
            self.hidden_size, self.gate = 6, nn.Conv2d(6, 6, 1)

        def forward(self, hidden, context):
            return self.gate(hidden).tanh().sum(1, keepdim=True) * context

    def __init__(self):
        super().__init__()
        self.stem, self.cell, self.head = nn.Conv2d(3, 16, 1), self.Cell(), nn.Conv2d(10, 2, 1)

    def forward(self, x):
        x = self.stem(x)
        width = self.cell.hidden_size
        hidden, context = x.split([width, x.shape[1] - width], 1)
        return self.head(self.cell(hidden, context))


def between(middle):
    return lambda: nn.Sequential(nn.Conv2d(3, 12, 1), nn.ReLU(), middle(), nn.Conv2d(12, 2, 1))


@pytest.mark.parametrize(
    ("build", "inside"),
    [
        (between(lambda: Cascaded(12)), {"2.qkvs.0.weight", "2.proj.weight", "0.weight"}),
        (between(lambda: Partial(12, 4, False)), {"0.weight", "2.mix.weight", "3.weight"}),
        (between(lambda: Partial(12, 4, True)), {"0.weight", "2.mix.weight", "3.weight"}),
        (Held, {"stem.weight", "cell.gate.weight", "head.weight"}),
    ],
)
def test_parts_follow_the_widths_that_name_them(build, inside):
    graph = exact(build, torch.randn(2, 3, 4, 4, dtype=torch.float64))
    assert inside <= cuttable(graph)


class Coincidence(nn.Module):
    """Parts by numbers in the code, one of them as large as how often something else happens."""

    def __init__(self):
        super().__init__()
        self.times = 4
        self.stem, self.head = nn.Conv2d(3, 12, 1), nn.Conv2d(8, 2, 1)

    def forward(self, x):
        first, rest = self.stem(x).split([4, 8], 1)
        for _ in range(self.times):
            rest = rest.tanh()
        return self.head(rest) + first.sum(1, keepdim=True)


def test_what_is_no_width_names_no_part():
    graph = exact(Coincidence, torch.randn(2, 3, 4, 4, dtype=torch.float64), seeds=1)
    assert "stem.weight" not in cuttable(graph)
    assert not graph.followers


class Scales(nn.Module):
    """Channels of three scales are stacked, and convolved over the scales by kernels of 1."""

    def __init__(self, kernel=1, padding=0):
        super().__init__()
        self.branches = nn.ModuleList(nn.Linear(5, 8) for _ in range(3))
        self.aggregate, self.head = nn.Conv1d(3, 1, kernel, padding=padding), nn.Linear(8, 2)

    def forward(self, x):
        return self.head(self.aggregate(torch.stack([branch(x) for branch in self.branches], 1)).squeeze(1))


def test_a_kernel_of_one_leaves_positions_where_they_are():
    x = torch.randn(2, 5, dtype=torch.float64)
    graph = exact(Scales, x)
    assert [group.size for group in graph.unlocked] == [8]
    assert "head.weight" in cuttable(graph)
    # two samples, two units: three branches, one aggregation over three, two outputs
    gone = graph.removed({graph.unlocked[0].name: [0, 1]})
    assert graph.macs - graph.left("macs", gone) == 2 * 2 * (3 * 5 + 3 + 2)


def test_a_wider_kernel_locks_what_it_runs_along():
    graph, _ = rehearse(Scales(3, 1).double(), torch.randn(2, 5, dtype=torch.float64))
    assert not graph.unlocked
    assert "convolved dimension" in str(graph)


class Equal(nn.Module):
    """The part's width is asked of a convolution; an integer that is called a width equals it, and is something else."""

    def __init__(self, use, **integers):
        super().__init__()
        self.use, self.mix = use, nn.Conv2d(2, 2, 3, padding=1)
        vars(self).update(integers)

    def forward(self, x):
        first, rest = x.split([self.mix.in_channels, x.shape[1] - self.mix.in_channels], 1)
        return torch.cat([self.use(self, self.mix(first)), rest], 1)


def repeatedly(module, x):
    for _ in range(module.num_hidden_layers):
        x = module.mix(x).tanh()
    return x


@pytest.mark.parametrize(
    ("use", "integer"),
    [
        (lambda module, x: x.softmax(module.dim), {"dim": 2}),
        (lambda module, x: x / module.num_features, {"num_features": 2}),
        (lambda module, x: x / module.num_features, {"num_features": 10}),
        (lambda module, x: x / module.dim, {"dim": 12, "part_dim": 2}),
        (repeatedly, {"num_hidden_layers": 2}),
    ],
)
def test_what_equals_a_part_by_chance_stays(use, integer):
    graph = exact(between(lambda: Equal(use, **integer)), torch.randn(2, 3, 4, 4, dtype=torch.float64))
    assert not graph.followers
    assert "0.weight" in cuttable(graph)


class Share(nn.Module):
    """One part is a share of the width, rounded: right as long as one unit leaves."""

    def __init__(self, mixes=True):
        super().__init__()
        self.dim, self.hidden_dim = 12, 4
        self.mix = nn.Conv2d(4, 4, 3, padding=1) if mixes else nn.BatchNorm2d(4)

    def forward(self, x):
        first, rest = x.split([self.dim // 3, self.dim - self.dim // 3], 1)
        return torch.cat([self.mix(first), rest], 1)


@pytest.mark.parametrize("mixes", [True, False])
def test_a_share_of_the_width_is_found_out(mixes):
    graph = exact(between(lambda: Share(mixes)), torch.randn(2, 3, 4, 4, dtype=torch.float64), seeds=8)
    assert "0.weight" not in cuttable(graph)


class Noted(Partial):
    """Forward notes on the module what it computed."""

    def forward(self, x):
        self.rest_dim = x.shape[1] - self.pdim
        first, rest = x.split([self.pdim, self.rest_dim], 1)
        return torch.cat([self.mix(first), rest], 1)


def test_what_forward_sets_itself_needs_no_following():
    graph = exact(between(lambda: Noted(12, 4, True)), torch.randn(2, 3, 4, 4, dtype=torch.float64))
    assert [follower.attribute for follower in graph.followers] == ["pdim"]


class Positions(nn.Module):
    """Positions that a linear layer makes pass a convolution, and are rearranged after it."""

    def __init__(self, rearranged, channels):
        super().__init__()
        self.rearranged = rearranged
        self.along, self.mix, self.beside = nn.Linear(5, 8), nn.Conv2d(6, 4, 1), nn.Linear(8, 3)
        self.head = nn.Linear(channels, 3)

    def forward(self, x):
        x = self.along(x)
        return self.beside(x).mean((1, 2)) + self.head(self.rearranged(self.mix(x)).flatten(2).mean(2))


def sampled(x):
    return nn.functional.grid_sample(torch.ones_like(x).cumsum(3), x[:, :2].permute(0, 2, 3, 1), align_corners=False)


@pytest.mark.parametrize(
    ("rearranged", "channels"), [(nn.PixelShuffle(2), 1), (nn.PixelUnshuffle(2), 16), (nn.Unfold(2), 16), (sampled, 4)]
)
def test_rearranged_positions_stay(rearranged, channels):
    graph = exact(lambda: Positions(rearranged, channels), torch.randn(2, 6, 4, 5, dtype=torch.float64))
    assert "along.weight" not in cuttable(graph)
    assert "positions" in str(graph)


def test_a_copied_graph_predicts_the_same():
    graph = exact(Scales, torch.randn(2, 5, dtype=torch.float64), seeds=1)
    for place in graph.extents:  # what is looked up is kept by identity, which a copy does not share
        _ = graph.extents[place]
    twin = pickle.loads(pickle.dumps(graph))
    flat = [[c for _, outputs in g.extents.values() for dims in outputs for c in dims] for g in (graph, twin)]
    assert any(column is not None for column in flat[0])
    for ours, theirs in zip(*flat, strict=True):
        assert (ours is None) == (theirs is None)
        assert ours is None or (ours == theirs).all()


class Distilled(nn.Module):
    """Parts as wide as integers of any name; or as numbers in the code, which those equal."""

    def __init__(self, names=("dc", "rc"), meant=True, **integers):
        super().__init__()
        self.names, self.meant = names, meant
        vars(self).update(zip(names, (4, 12), strict=True), **integers)
        self.stem, self.first, self.second = (nn.Conv2d(a, 16, 3, padding=1) for a in (3, 16, 12))
        self.last, self.head = nn.Conv2d(12, 4, 3, padding=1), nn.Conv2d(12, 2, 1)

    def forward(self, x):
        few, many = (getattr(self, name) for name in self.names)
        sizes = (few, many) if self.meant else (4, 12)
        one, rest = self.first(self.stem(x).relu()).split(sizes, 1)
        two, rest = self.second(rest.relu()).split(sizes, 1)
        return self.head(torch.cat([one, two, self.last(rest.relu())], 1)) * (1.0 if self.meant else few / many)


SPLIT = {"first.weight", "second.weight"}


@pytest.mark.parametrize("names", [("dc", "rc"), ("d_state", "dt_rank"), ("part_dim", "rest_dim")])
def test_parts_follow_integers_of_any_name(names):
    graph = exact(lambda: Distilled(names), torch.randn(2, 3, 4, 4, dtype=torch.float64), seeds=6)
    # where they are split, and where they are read
    assert sorted(group.size for group in graph.unlocked) == [4, 4, 12, 16], str(graph)
    assert {tensor for group in graph.unlocked for tensor, dim in group.members if dim == 0} >= SPLIT


@pytest.mark.parametrize(("meant", "integers"), [(False, {}), (True, {"depth": 4})])
def test_parts_that_no_integer_names_or_several_do_stay(meant, integers):
    graph = exact(lambda: Distilled(meant=meant, **integers), torch.randn(2, 3, 4, 4, dtype=torch.float64))
    assert not SPLIT & {tensor for group in graph.unlocked for tensor, dim in group.members if dim == 0}
