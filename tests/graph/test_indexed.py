"""Reading rows and writing by index: message passing, scatters, bags of embeddings."""

import pytest
import torch
from torch import nn

from actprune import trace
from actprune.pruning.plans import draft
from actprune.pruning.verify import rehearse
from actprune.surgery import cut
from masked import counted, difference, masked, outputs, random_units
from zoo import scatter_

EDGES = torch.tensor([[0, 1, 2, 3, 4, 0, 2, 5], [1, 2, 0, 1, 5, 3, 4, 0]])


class Bags(nn.Module):
    """The same words summed, averaged, compared and weighted, with offsets and in rows of one length."""

    def __init__(self):
        super().__init__()
        self.bags = nn.ModuleList(nn.EmbeddingBag(9, 6, mode=mode, include_last_offset=True) for mode in ("sum", "mean", "max"))
        self.weighted, self.padded = nn.EmbeddingBag(9, 5, mode="sum"), nn.EmbeddingBag(9, 5, padding_idx=2)
        self.mid, self.head = nn.Linear(6, 7), nn.Linear(12, 3)

    def forward(self, words):
        rows, flat = words.shape[1], words.flatten()
        ends = torch.arange(0, len(flat) + 1, rows)
        a = self.mid(sum(bag(flat, ends) for bag in self.bags)).relu()
        b = self.weighted(words, per_sample_weights=torch.linspace(0.5, 1.5, words.numel()).view(words.shape).to(a.dtype))
        return self.head(torch.cat([a, b + self.padded(words)], 1))


class Convolution(nn.Module):
    """Message passing; ``how`` says by which operator messages come together."""

    def __init__(self, i, o, how):
        super().__init__()
        self.message, self.own, self.how, self.channels = nn.Linear(2 * i, o), nn.Linear(i, o), how, o

    def forward(self, x, edges):
        to, source = edges
        message = self.message(torch.cat([x[source], x.index_select(0, to)], 1)).relu()
        return self.own(x) + self.gather(message, to, len(x))

    def gather(self, message, to, n):
        wide, width = to.unsqueeze(1).expand(-1, message.shape[1]), message.shape[1]
        if self.how == "index_add":
            return message.new_zeros(n, width).index_add(0, to, message)
        if self.how == "scatter_add":
            return torch.zeros(n, width, dtype=message.dtype).scatter_add_(0, wide, message)
        if self.how == "attribute":
            return torch.zeros(n, self.channels, dtype=message.dtype).scatter_add_(0, to[:, None].expand_as(message), message)
        if self.how == "amax":
            return torch.zeros(n, width, dtype=message.dtype).scatter_reduce(0, to[:, None].repeat(1, width), message, "amax")
        if self.how == "mean":
            mean = message.new_zeros(n, width).scatter_reduce_(0, wide, message, "mean", include_self=False)
            return mean + mean.index_reduce(0, to, message, "amin")
        if self.how == "index_put":
            return message.new_zeros(n, width).index_put((to,), message, accumulate=True)
        table = message.new_zeros(n, width)  # the last of equal targets need not win: every target once
        first = message[:n]
        order = torch.arange(n - 1, -1, -1)
        table = table.index_copy(0, order, first).index_fill(0, order[:1], 0.5)
        table[order[2]] += 1.0
        table[torch.tensor([True, False, True, False, True, False])] = first[:3]
        wide = order[:, None].expand(-1, width)
        return table.scatter(0, wide[:3], first[:3]).scatter(0, wide[:1], 0.25)


class Messages(nn.Module):
    def __init__(self, how):
        super().__init__()
        self.one, self.two, self.norm = Convolution(5, 8, how), Convolution(8, 6, how), nn.LayerNorm(8)
        self.head = nn.Linear(6, 3)

    def forward(self, x):
        return self.head(self.two(self.norm(self.one(x, EDGES)).relu(), EDGES).relu())


class Trailing(nn.Module):
    """Positions of a feature map are written, channels first: indices stand behind the channels, and around them."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.head = nn.Conv1d(3, 8, 1), nn.Conv1d(3, 8, 1), nn.Linear(8, 4)

    def forward(self, x):
        y, z = self.a(x).relu(), self.b(x[:, :, :3])
        at = torch.tensor([4, 0, 2])
        y = y.index_add(-1, at, z).scatter_add(2, at.expand(len(x), z.shape[1], 3), z.tanh())
        y[:, :, at] = z.sigmoid()
        y[torch.arange(len(x)), :, torch.tensor([1, 3])] = z.mean(2)
        y[:, :, at[1:]] += z[:, :, :1]
        grid = y.transpose(1, 2)
        mask = torch.zeros(grid.shape[:2], dtype=torch.bool)
        mask[0, 1] = mask[1, 4] = True
        grid[mask] = grid[~mask].mean(0)
        return self.head(grid.mean(1))


class Placeholders(nn.Module):
    """Rows of another stream take the places that a mask names; whether they are as many is asked first."""

    def __init__(self, wide):
        super().__init__()
        self.words, self.picture, self.head, self.wide = nn.Embedding(9, 8), nn.Linear(3, 8), nn.Linear(8, 4), wide

    def forward(self, words):
        x, mask = self.words(words), (words < 4).unsqueeze(-1)
        rows = self.picture(torch.linspace(-1, 1, 3 * int(mask.sum())).view(-1, 3).to(x.dtype))
        if self.wide:
            mask = mask.expand_as(x)
            assert x[mask].numel() == rows.numel()
        return self.head(x.masked_scatter(mask, rows.tanh())).mean(1)


class Segments(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.head = nn.Linear(5, 8), nn.Linear(8, 4)

    def forward(self, x):
        lengths = torch.tensor([2, 1, 3])
        return self.head(torch.segment_reduce(self.a(x).relu(), "mean", lengths=lengths))


class Locked(nn.Module):
    """Channels themselves are written by number."""

    def __init__(self, how):
        super().__init__()
        self.a, self.head, self.how = nn.Linear(5, 8), nn.Linear(8, 3), how

    def forward(self, x):
        x = self.a(x).relu()
        at = torch.tensor([0, 3])
        if self.how == "add":
            x = x.index_add(1, at, torch.ones(len(x), 2, dtype=x.dtype))
        elif self.how == "scatter":
            x = x.scatter(1, at.expand(len(x), -1), 1.0)
        elif self.how == "masked":
            x = x.masked_scatter(x > 0.1, torch.ones(len(x), 8, dtype=x.dtype))
        elif self.how == "read":  # values that a mask picks
            return self.head(x) + x[torch.ones(4, 8, dtype=torch.bool)].mean()
        elif self.how == "short":  # all rows, half of the channels
            x = x.scatter_add(0, torch.zeros(1, 4, dtype=torch.long), torch.ones(1, 4, dtype=x.dtype))
        else:
            x = x.index_put((torch.arange(2)[:, None], at), torch.ones(2, dtype=x.dtype))
        return self.head(x)


class Filled(nn.Module):
    """Numbers written where masks of all channels say, as people write clipping."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.head = nn.Linear(5, 8), nn.Linear(8, 6), nn.Linear(6, 3)

    def forward(self, x):
        x = self.a(x)
        x[x < 0] = 0.0
        x = self.b(x)
        x[x.abs() < 0.1] = 0.3
        x = x.masked_fill(x < -1, torch.tensor(-1.0, dtype=x.dtype))
        return self.head(x.index_put((x > 1,), torch.ones((), dtype=x.dtype)))


def drawn(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


WORDS = torch.randint(0, 9, (4, 3), generator=torch.Generator().manual_seed(0))

NETS = {
    "bags": (Bags, WORDS, [5, 6, 7]),
    "placeholders": (lambda: Placeholders(wide=True), WORDS, [8]),
    "placeholders, narrow mask": (lambda: Placeholders(wide=False), WORDS, [8]),
    "filled": (Filled, drawn(4, 5), [6, 8]),
    "segments": (Segments, drawn(6, 5), [8]),
    "trailing": (Trailing, drawn(2, 3, 5), [8]),
} | {
    how: (lambda how=how: Messages(how), drawn(6, 5), [6, 8])
    for how in ("index_add", "scatter_add", "attribute", "amax", "mean", "index_put", "others")
}


@pytest.mark.filterwarnings("ignore:index_reduce")
@pytest.mark.parametrize("name", NETS)
def test_channels_are_cut_exactly(name):
    make, example, sizes = NETS[name]
    for seed in range(4):
        torch.manual_seed(seed)
        model = make().double()
        scatter_(model)
        x = example.double() if example.is_floating_point() else example
        graph, _ = rehearse(model, x)
        assert sorted(g.size for g in graph.unlocked) == sizes, str(graph)
        assert not graph.unknown
        assert counted(model, x) == (graph.params, graph.macs)
        plan = draft(model, graph, random_units(graph, seed))
        references = [masked(model, plan), masked(model, plan, consumers_only=True)]
        before = outputs(model, x)
        cut(model, plan, x)
        ours = outputs(model, x)
        for reference in references:
            assert difference(ours, outputs(reference, x)) < 1e-11, (seed, plan.removed)
        assert not plan.removed or difference(ours, before) > 1e-3
        after = trace(model, x)
        assert counted(model, x) == (plan.params_after, plan.macs_after) == (after.params, after.macs)
        model.train()(x).square().sum().backward()


@pytest.mark.parametrize("how", ["add", "scatter", "short", "put", "masked", "read"])
def test_channels_written_by_number_stay(how):
    graph = trace(Locked(how), torch.randn(4, 5))
    assert not graph.unlocked
    assert any(word in (g.locked or "") for word in ("written by pos", "indexed by pos") for g in graph.groups if g.size == 8)
