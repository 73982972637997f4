"""Losses and counts of hidden features are pointwise and a reduction in one, and are cut as what is written by hand."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from actprune.pruning.verify import rehearse
from masked import check_cuts

TOKENS = torch.randn(2, 6, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


class Beside(nn.Module):
    """Something of two layers' outputs, beside what is made of their product."""

    def __init__(self, beside):
        super().__init__()
        self.beside = beside
        self.left, self.right, self.outer = nn.Linear(5, 8), nn.Linear(5, 8), nn.Linear(8, 3)

    def forward(self, x):
        a, b = self.left(x), self.right(x)
        return self.outer(a * b), self.beside(a, b)


class Quantised(nn.Module):
    """Every position takes the code that is nearest, and the encoder commits to it, as a VQ-VAE has it."""

    def __init__(self):
        super().__init__()
        self.left, self.codes, self.decode = nn.Linear(5, 8), nn.Embedding(7, 8), nn.Linear(8, 3)

    def forward(self, x):
        x = self.left(x)
        code = self.codes(torch.cdist(x.flatten(0, 1), self.codes.weight).argmin(1)).view_as(x)
        loss = F.mse_loss(code, x.detach()) + 0.25 * F.mse_loss(x, code.detach())
        return self.decode(x + (code - x).detach()), loss


def covariance(a, b):
    return a.flatten(0, 1).t() @ b.flatten(0, 1)


LOSSES = [F.mse_loss, F.l1_loss, F.smooth_l1_loss, F.huber_loss, F.binary_cross_entropy_with_logits, F.soft_margin_loss]


@pytest.mark.parametrize(
    "beside",
    [
        *LOSSES,
        lambda a, b: F.mse_loss(a, b, reduction="sum"),
        lambda a, b: F.mse_loss(a, b, reduction="none").mean(-1),
        lambda a, b: F.huber_loss(a, b, reduction="none").sum(-1),
        lambda a, b: F.mse_loss(a.sigmoid(), b.cos()),
        lambda a, b: F.binary_cross_entropy(a.sigmoid(), b.sigmoid()),
        torch.dist,
        lambda a, b: torch.count_nonzero(a.relu(), -1).double(),
        lambda a, b: (a * b).nansum(-1),
        lambda a, b: torch.stack(torch.aminmax(a, dim=-1)),
        lambda a, b: torch.aminmax(a, dim=1).max.sum(-1),
        lambda a, b: a.logcumsumexp(1).mean(-1),
        lambda a, b: covariance(a, b).diagonal().sum(),
        lambda a, b: torch.diagonal(a.transpose(1, 2) @ b, dim1=1, dim2=2).mean(-1),
    ],
)
def test_cut_equals_masked(beside):
    def net():
        return Beside(beside)

    torch.manual_seed(0)
    graph, _ = rehearse(net().double(), TOKENS)
    assert graph.group("left").locked is None, str(graph)
    assert not graph.unknown
    check_cuts(net, graph, TOKENS, counts=False)


def test_a_code_is_cut_with_its_commitment():
    torch.manual_seed(0)
    graph, _ = rehearse(Quantised().double(), TOKENS)
    assert graph.group("left").locked is None, str(graph)
    check_cuts(Quantised, graph, TOKENS, counts=False)


@pytest.mark.parametrize(
    ("beside", "reason"),
    [
        (lambda a, b: F.mse_loss(a.sigmoid(), b.cos(), reduction="sum"), "what has left would not be zero"),
        (lambda a, b: F.binary_cross_entropy_with_logits(a, b, reduction="sum"), "what has left would not be zero"),
        (lambda a, b: torch.dist(a.exp(), b.cos() * 2), "what has left would not be zero"),
        (lambda a, b: a.sigmoid().nansum(-1), "what has left would not be zero"),
        (lambda a, b: a.logcumsumexp(1).sum(-1), "what has left would not be zero"),
        (lambda a, b: a.logcumsumexp(-1).mean(-1), "ordered along this dimension"),
        (lambda a, b: covariance(a, b).diagonal(1).sum(), "diagonal of this dimension"),
    ],
)
def test_what_would_say_something_else_is_locked(beside, reason):
    graph, _ = rehearse(Beside(beside).double(), TOKENS)
    assert reason in (graph.group("left").locked or ""), str(graph)
    assert not graph.unknown
