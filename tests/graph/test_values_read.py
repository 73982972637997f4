"""Code that reads values of tensors: what it does for them may differ in a cut model, what it does for a width must not."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torchvision.ops import nms

from actprune.pruning.verify import rehearse
from masked import check_cuts

READS = {
    "item": lambda t, x: int(t.max()),
    "list": lambda t, x: t.tolist(),
    "array": lambda t, x: t.numpy(),
    "mask": lambda t, x: bool((t == 3).any()),
    "nonzero": lambda t, x: (t > 3).nonzero(),
    "picked": lambda t, x: t[t > 3],
    "different": lambda t, x: t.unique(),
    "item of features": lambda t, x: x.mean().item(),
    "list of features": lambda t, x: x.sum(-1).tolist(),
    "array of channels": lambda t, x: np.asarray(x.sum((0, 1))),
    "list of channels": lambda t, x: x.sum((0, 1)).tolist(),
    "array of features": lambda t, x: x.detach().numpy().sum(),
    "mask of features": lambda t, x: bool((x > 2).any()),
    "picked features": lambda t, x: x[x > 0].sum(),
    "picked rows": lambda t, x: x[x.sum(-1) > 0],
    "a number of large features": lambda t, x: (x > 0).sum().item(),
}


def scaled(module, x):
    return x * x.size(-1) ** 0.5


def branch(module, x):
    return F.gelu(x) if x.shape[-1] >= 24 else F.relu(x)


def fewer(module, x):
    return x.tanh().sin() if x.shape[-1] >= 24 else x.tanh()


def other_module(module, x):
    return module.one(x) if x.shape[-1] >= 24 else module.other(x)


def window(module, x):
    return x[:, : x.shape[-1] // 8]


class Inner(nn.Module):
    def __init__(self, does):
        super().__init__()
        self.does, self.one, self.other = does, nn.Tanh(), nn.Hardtanh(-0.3, 0.3)

    def forward(self, x):
        return self.does(self, x)


class Read(nn.Module):
    def __init__(self, reads):
        super().__init__()
        self.reads = reads

    def forward(self, t, x):
        self.reads(t, x)


class Sequence(nn.Module):
    """Something is read in a module of its own or in the model, before or after a module asks for a width, which may be it."""

    def __init__(self, reads, does, order):
        super().__init__()
        self.embed, self.inner, self.outer = nn.Embedding(20, 24), Inner(does), nn.Linear(24, 5)
        self.read, self.does, self.order = Read(reads), does, order
        self.one, self.other = nn.Tanh(), nn.Hardtanh(-0.3, 0.3)

    def forward(self, t):
        x = self.embed(t)
        if self.order == "before":
            self.read.reads(t, x)
        if self.order == "sibling before":
            self.read(t, x)
        x = self.inner(x) if self.order.startswith("sibling") else self.does(self, x)
        if self.order == "after":
            self.read.reads(t, x)
        if self.order == "sibling after":
            self.read(t, x)
        return self.outer(x)


def _ids():
    return torch.randint(0, 20, (3, 6), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("order", ["before", "sibling before", "after", "sibling after"])
@pytest.mark.parametrize("does", [scaled, branch, fewer, other_module, window])
@pytest.mark.parametrize("name", READS)
def test_a_width_that_is_asked_beside_a_read_stays(name, does, order):
    torch.manual_seed(0)
    graph, _ = rehearse(Sequence(READS[name], does, order).double(), _ids())
    assert not graph.unlocked, str(graph)
    if name != "picked features":  # by which they are locked
        assert "follows a width" in str(graph) or "a width decides" in str(graph)


class SASRec(nn.Module):
    """As published: ids through numpy, embeddings times the root of their width, masks from what the ids say."""

    def __init__(self):
        super().__init__()
        self.items, self.places = nn.Embedding(21, 16, padding_idx=0), nn.Embedding(8, 16, padding_idx=0)
        self.norm, self.attention = nn.LayerNorm(16), nn.MultiheadAttention(16, 2)
        self.wide, self.narrow, self.last = nn.Conv1d(16, 12, 1), nn.Conv1d(12, 16, 1), nn.LayerNorm(16)

    def forward(self, t):
        ids = t.numpy()
        x = self.items(torch.LongTensor(ids)) * self.items.embedding_dim**0.5
        places = torch.arange(1, ids.shape[1] + 1).repeat(len(ids), 1).numpy() * (ids != 0)
        x = (x + self.places(torch.LongTensor(places))).transpose(0, 1)
        mask = ~torch.tril(torch.ones(len(x), len(x), dtype=torch.bool))
        y = self.norm(x)
        x = (y + self.attention(y, y, y, attn_mask=mask)[0]).transpose(0, 1)
        y = self.narrow(self.wide(x.transpose(1, 2)).relu()).transpose(1, 2)
        return (self.last(x + y) * self.items(t)).sum(-1)


def test_sasrec_keeps_the_width_whose_root_it_takes():
    torch.manual_seed(0)
    t = torch.tensor([[0, 0, 3, 7, 9, 20], [4, 8, 1, 2, 2, 11]])
    graph, _ = rehearse(SASRec().double(), t)
    assert "a number that follows a width" in graph.group("attention.out_proj").locked
    assert graph.group("wide").locked is None
    check_cuts(SASRec, graph, t, counts=False)


def written_elsewhere(m, x):
    """A width stands in a tensor that was used to write to another one."""
    width, rows = torch.arange(1, x.shape[1] + 1)[-1:].clone(), x.sum(-1)
    rows.mul_(width)
    return x / width.item() ** 0.5 + 0 * rows[:, None]


def used_again(m, x):
    """Positions may lie where features have lain."""
    for _ in range(3):
        features = torch.zeros_like(x)
        features.copy_(x)
        del features
    return x / (1 + torch.arange(x.numel())[-1].item()) ** 0.5


WIDTHS = {
    "a factor": written_elsewhere,
    "memory that was used": used_again,
    "ones": lambda m, x: x / torch.ones_like(x[0]).sum().item() ** 0.5,
    "positions": lambda m, x: x / (1 + torch.arange(x.shape[1]).max().item()),
    "a list of positions": lambda m, x: x * torch.arange(x.shape[1]).tolist()[-1],
    "an array of positions": lambda m, x: x * float(torch.zeros(x.shape[1]).numpy().size),
    "length of a list": lambda m, x: x / len(x.sum(0).tolist()) ** 0.5,
    "written ones": lambda m, x: x / x.new_zeros(x.shape[1]).fill_(1).sum().item(),
}


class Features(nn.Module):
    def __init__(self, does):
        super().__init__()
        self.inner, self.outer, self.does = nn.Linear(5, 24), nn.Linear(24, 6), does
        self.again, self.last = nn.Linear(6, 6), nn.Linear(6, 3)
        self.experts = nn.ModuleList(nn.Linear(24, 24) for _ in range(3))

    def forward(self, x):
        return self.last(self.outer(self.does(self, self.inner(x))))


@pytest.mark.parametrize("name", WIDTHS)
def test_a_width_that_is_read_stays(name):
    torch.manual_seed(0)
    x = torch.randn(4, 5, dtype=torch.float64)
    graph, _ = rehearse(Features(WIDTHS[name]).double(), x)
    assert graph.group("inner").locked is not None, str(graph)
    check_cuts(lambda: Features(WIDTHS[name]), graph, x, counts=False)


def sent(m, x):
    """Experts get what a list says, in buffers as long as the longest."""
    to = (40 * x.sum(-1)).long() % 3
    room = max(torch.bincount(to, minlength=3).tolist())
    y = torch.zeros_like(x)
    for number, expert in enumerate(m.experts):
        rows = x.new_zeros(room, x.shape[1])
        picked = x[to == number]
        rows[: len(picked)] = picked
        y[to == number] = expert(rows)[: len(picked)]
    return y


def kept(m, x):
    """Code that keeps what overlaps least, as detectors do."""
    y = m.outer(x)
    boxes = torch.stack([y[:, 0], y[:, 1], y[:, 0] + 1, y[:, 1] + 1], 1)
    return x[nms(boxes.float(), y[:, 2].float(), 0.1)]


def numbered(m, x):
    """As many classes as the largest says, which differs: what the trace has read does not fit to what is computed."""
    y = torch.zeros(int((40 * x.sum(-1)).abs().max()) + 1, x.shape[1], dtype=x.dtype)
    return x + y.index_add(0, (40 * x.sum(-1)).abs().long(), x).sum(0)


SEEN = []


def as_seen_first(m, x):
    """The first order of the rows that was seen is that of the trace."""
    order = x.detach().sum(-1).argsort()
    SEEN.extend([order] if not SEEN else [])
    return m.experts[0](x) if torch.equal(order, SEEN[0]) else m.experts[1](x)


def beside(m, x):
    torch.tensor(x.shape[-1])  # which nobody uses
    return numbered(m, x)


DATA = {
    "order": as_seen_first,
    "classes beside a width": beside,
    "temperature": lambda m, x: x / x.abs().max().item(),
    "exponent": lambda m, x: x.abs() ** (1 + x.square().sum(-1).mean().sqrt().item()),
    "threshold": lambda m, x: x * (x > sorted(x.sum(0).tolist())[-2] / 10),
    "row threshold": lambda m, x: x * (x.sum(-1, keepdim=True) > sorted(x.sum(-1).tolist())[1]),
    "steps": lambda m, x: [x := x.tanh() for _ in range(1 + int(x.abs().sum()) % 5)][-1],
    "branch": lambda m, x: m.experts[0](x) if x.sum().item() > 0 else m.experts[1](x),
    "expert by score": lambda m, x: m.experts[int((40 * x.sum(-1)).long()[0]) % 3](x),
    "rows by score": lambda m, x: x[[int(i) for i in x.detach().sum(-1).numpy().argsort()]],
    "tokens by score": lambda m, x: x[x.sum(-1) > x.sum(-1).mean()].mean(0, keepdim=True),
    "capacity": sent,
    "written by mask": lambda m, x: x.masked_scatter((x.sum(-1) > 0)[:, None], m.experts[0](x[x.sum(-1) > 0])),
    "largest channel": lambda m, x: x * float(np.sort(x.detach().abs().sum(0).numpy())[-1]),
    "how many": lambda m, x: x * torch.nonzero(x.sum(-1) > 0).numel(),
    "boxes": kept,
    "classes": numbered,
}


@pytest.mark.parametrize("name", DATA)
def test_what_data_decide_keeps_no_width(name):
    torch.manual_seed(0)
    SEEN.clear()
    x = torch.randn(7, 5, dtype=torch.float64)
    graph, _ = rehearse(Features(DATA[name]).double(), x)
    assert graph.group("inner").locked is None, str(graph)
    assert not graph.extents._told  # the values are only for the rehearsal
    check_cuts(lambda: Features(DATA[name]), graph, x, counts=False)


# where what the trace has read does not fit, data may decide what runs
ASKED = [
    (name, asks)
    for name in DATA
    for asks in (scaled, branch)
    if (name, asks) not in (("classes", branch), ("classes beside a width", branch))
]


@pytest.mark.parametrize("order", ["before", "after"])
@pytest.mark.parametrize(("name", "asks"), ASKED)
def test_a_width_that_is_asked_beside_what_data_decide_stays(name, asks, order):
    def does(m, x):
        if order == "before":
            return asks(m, x) + DATA[name](m, x).sum()
        y = DATA[name](m, x).sum()
        return asks(m, x) + y

    torch.manual_seed(0)
    x = torch.randn(7, 5, dtype=torch.float64)
    graph, _ = rehearse(Features(does).double(), x)
    assert graph.group("inner").locked is not None, str(graph)


class Told(nn.Module):
    """A number that one module reads is what another computes with."""

    def __init__(self):
        super().__init__()
        self.inner, self.outer = nn.Linear(5, 24), nn.Linear(24, 3)
        self.score, self.use = Score(), Use()

    def forward(self, x):
        x = self.inner(x)
        return self.outer(self.use(x, self.score(x)))


class Score(nn.Module):
    def forward(self, x):
        return x.abs().max().item()


class Use(nn.Module):
    def forward(self, x, score):
        return x.tanh() / score if score < 3 else x / score


def test_a_number_that_another_module_reads_keeps_no_width():
    torch.manual_seed(0)
    x = torch.randn(7, 5, dtype=torch.float64)
    graph, _ = rehearse(Told().double(), x)
    assert graph.group("inner").locked is None, str(graph)
    check_cuts(Told, graph, x)
