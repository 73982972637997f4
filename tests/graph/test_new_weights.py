"""A weight that a convolution is the first to read takes the ids of what it reads: cut == masked, whatever these are."""

import pytest
import torch
from torch import nn

from actprune.graph.tracer import run
from actprune.pruning.verify import rehearse
from masked import check_cuts


class Net(nn.Module):
    """A layer of 6 channels, what ``between`` makes of it, and a layer that reads that."""

    def __init__(self, between, reads, layer=nn.Conv2d):
        super().__init__()
        self.first, self.second, self.head = nn.Conv2d(3, 6, 3), layer(reads, 8, 3), nn.Conv2d(8, 4, 1)
        self.between = between

    def forward(self, x):
        return self.head(self.second(self.between(self, x, self.first(x).relu())).relu()).mean((2, 3))


def alone(net, x, y):
    return y


def beside_the_image(net, x, y):
    return torch.cat([x[:, :, 1:-1, 1:-1], y], 1)


def twice(net, x, y):
    return torch.cat([y, y], 1)


def broadcast(net, x, y):
    return torch.cat([y, x.mean(1, keepdim=True)[..., 1:-1, 1:-1].expand(-1, 2, -1, -1)], 1)


def beside_zeros(net, x, y):
    return torch.cat([y, y.new_zeros(len(y), 2, *y.shape[2:])], 1)


def rewritten(net, x, y):
    """The weight is written to before anything reads it."""
    with torch.no_grad():
        net.second.weight.clamp_(-1, 1)
    return y


def read_before(net, x, y):
    """Another operator reads the weight first."""
    net.second.weight.tanh()
    return y


@pytest.mark.parametrize(
    ("between", "reads"),
    [
        (alone, 6),
        (beside_the_image, 9),
        (twice, 12),
        (broadcast, 8),
        (beside_zeros, 8),
        (rewritten, 6),
        (read_before, 6),
    ],
)
@pytest.mark.parametrize("layer", [nn.Conv2d, nn.ConvTranspose2d])
def test_cut_equals_masked(between, reads, layer):
    torch.manual_seed(0)
    x = torch.rand(2, 3, 6, 6, dtype=torch.float64)
    graph, _ = rehearse(Net(between, reads, layer).double(), x)
    assert sorted(group.size for group in graph.unlocked) == [6, 8], str(graph)
    check_cuts(lambda: Net(between, reads, layer), graph, x)


def test_a_layer_that_reads_two_widths_ties_them():
    class Siblings(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.both = nn.Conv2d(3, 6, 1), nn.Conv2d(3, 6, 1), nn.Conv2d(6, 4, 1)

        def forward(self, x):
            return self.both(self.a(x).relu()) + self.both(self.b(x).relu())

    model = Siblings().eval()
    graph, _ = rehearse(model, torch.rand(2, 3, 4, 4))
    assert [(group.size, [name for name, _ in group.members]) for group in graph.unlocked] == [
        (6, ["a.weight", "a.bias", "both.weight", "b.weight", "b.bias"])
    ]


def test_a_weight_has_no_ids_beside_those_that_it_reads():
    model = nn.Sequential(nn.Conv2d(3, 6, 1), nn.Conv2d(6, 4, 1))
    state = run(model, torch.rand(1, 3, 4, 4))
    assert state.tensor_ids["1.weight"][1] is state.tensor_ids["0.weight"][0]
    assert len(state.space) == (6 + 3 + 1 + 1 + 6) + (4 + 1 + 1 + 4)
