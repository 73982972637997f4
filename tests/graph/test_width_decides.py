"""Code that runs other operators where a width is another: loops as long as one, branches on one, layers skipped by one."""

import pytest
import torch
from torch import nn

from actprune.pruning.verify import rehearse
from masked import check_cuts


class Decided(nn.Module):
    """What runs between two layers, with the width between them."""

    def __init__(self, between):
        super().__init__()
        self.inner, self.outer, self.between = nn.Linear(5, 16), nn.Linear(16, 6), between
        self.again, self.last = nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x):
        x = self.inner(x)
        return self.last(self.between(self, self.outer(x), x.shape[-1]).relu())


def steps(module, y, n):
    for _ in range(n // 4):
        y = 0.5 * y.tanh() + 0.1
    return y


def calls(module, y, n):
    for _ in range(n // 8):
        y = module.again(y)
    return y


def picks(module, y, n):
    return y + sum(y[:, i : i + 1] for i in range(n // 4))


BETWEEN = {
    "a loop of operators": (steps, False),
    "a loop of calls": (calls, False),
    "a loop of slices": (picks, False),
    "a branch": (lambda m, y, n: m.again(y) if n > 12 else y, False),
    "another branch": (lambda m, y, n: y.sigmoid() if n == 16 else y.tanh(), False),
    "a step": (lambda m, y, n: y + y.repeat_interleave(4, 1)[:, :: max(n // 4, 1)][:, :6], False),
    "a loop of the module's own": (lambda m, y, n: calls(m, y, 24), True),
    "a branch on a list": (lambda m, y, n: m.again(y) if max(y.sum(1).tolist()) > 0 else y, True),
    "rows by an array": (lambda m, y, n: y[[int(i) for i in y.detach().sum(1).numpy().argsort()]], True),
    "a list of a width": (lambda m, y, n: y * torch.tensor([n]).tolist()[0], False),
    "a branch on data": (lambda m, y, n: m.again(y) if y.sum().item() > 0 else y, True),
}


@pytest.mark.parametrize("case", BETWEEN)
def test_a_width_that_decides_what_runs_stays(case):
    between, leaves = BETWEEN[case]
    torch.manual_seed(0)
    x = torch.randn(4, 5, dtype=torch.float64)
    graph, _ = rehearse(Decided(between).double(), x)
    group = graph.group("inner")
    assert (group.locked is None) == leaves, str(graph)
    check_cuts(lambda: Decided(between), graph, x, counts=False)
