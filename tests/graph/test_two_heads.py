"""Two heads in every block, counted by one integer that no name gives away: it follows all blocks or none."""

import torch
from torch import nn
from torch.nn import functional as F

from actprune.pruning.verify import rehearse
from masked import check_cuts


class Blocks(nn.Module):
    def __init__(self):
        super().__init__()
        self.h = 2
        self.stem, self.head = nn.Linear(6, 8), nn.Linear(8, 3)
        self.layers = nn.ModuleList(nn.ModuleDict({"qkv": nn.Linear(8, 24), "out": nn.Linear(8, 8)}) for _ in range(2))

    def forward(self, x):
        x = self.stem(x)
        b, n, _ = x.shape
        for block in self.layers:
            q, k, v = block["qkv"](x).reshape(b, n, 3, self.h, -1).permute(2, 0, 3, 1, 4).unbind(0)
            x = x + block["out"](F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, n, -1))
        return self.head(x)


def test_cut_equals_masked():
    x = torch.rand(2, 5, 6, dtype=torch.float64)
    graph, _ = rehearse(Blocks().double(), x)
    assert sorted(group.size for group in graph.unlocked) == [2, 8], str(graph)
    check_cuts(Blocks, graph, x, seeds=6, counts=False)
