"""A view splits a dimension, and one of the factors is picked apart afterwards: the other one is what leaves."""

import pytest
import torch
from torch import nn

from actprune.pruning.verify import rehearse
from masked import check_cuts


class ByTwos(nn.Module):
    """Even and odd channels go different ways, as in ShuffleNet."""

    def __init__(self):
        super().__init__()
        self.stem, self.branch, self.head = nn.Conv2d(3, 8, 1), nn.Conv2d(4, 4, 1), nn.Conv2d(8, 3, 1)

    def forward(self, x):
        x = self.stem(x)
        b, c, h, w = x.shape
        even, odd = x.reshape(b * c // 2, 2, h * w).permute(1, 0, 2).reshape(2, -1, c // 2, h, w)
        return self.head(torch.cat([even, self.branch(odd).relu()], 1))


class TwoHeads(nn.Module):
    """As many heads as PyTorch packs of keys and values; of learned queries it sums over tokens that could be cut."""

    def __init__(self):
        super().__init__()
        self.stem, self.head = nn.Linear(6, 12), nn.Linear(12, 4)
        self.decoder = nn.TransformerDecoderLayer(12, 2, 10, dropout=0.0)
        self.queries = nn.Parameter(torch.rand(5, 12))

    def forward(self, x):
        return self.head(self.decoder(self.queries.unsqueeze(1).repeat(1, x.shape[1], 1), self.stem(x)))


@pytest.mark.parametrize(("build", "shape", "sizes"), [(ByTwos, (2, 3, 4, 4), [4, 4]), (TwoHeads, (7, 2, 6), [2, 2, 10, 12])])
def test_what_is_not_picked_apart_can_be_cut(build, shape, sizes):
    torch.manual_seed(0)
    x = torch.rand(shape, dtype=torch.float64)
    graph, _ = rehearse(build().double(), x)
    assert sorted(group.size for group in graph.unlocked) == sizes, str(graph)
    check_cuts(build, graph, x, counts=False)
