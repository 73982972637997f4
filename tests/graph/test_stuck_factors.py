"""A view splits a dimension into maps, and positions of a map cannot leave: whole channels do, as many as the code allows."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from actprune.graph import splits, tracer
from actprune.pruning.verify import rehearse
from masked import check_cuts


class Decoder(nn.Module):
    """From a code to maps: ``view`` is how the code becomes maps, ``up`` what is done to them first."""

    def __init__(self, view, up=nn.Identity, channels=10):
        super().__init__()
        self.ch, self.linear, self.view, self.up = channels, nn.Linear(6, channels * 16), view, up()
        self.norm, self.conv = nn.BatchNorm2d(channels), nn.ConvTranspose2d(channels, 7, 4, 2, 1)
        self.head = nn.Conv2d(7, 3, 3, padding=1)

    def forward(self, z):
        x = self.linear(z).relu()
        x = self.view(x) if isinstance(self.view, nn.Module) else self.view(self, x)
        return self.head(self.conv(self.norm(self.up(x)).relu()).relu()).sigmoid()


VIEWS = {
    "a width": lambda: lambda m, x: x.view(-1, m.ch, 4, 4),
    "the rest": lambda: lambda m, x: x.view(x.size(0), -1, 4, 4),
    "a quotient": lambda: lambda m, x: x.reshape(x.shape[0], x.shape[1] // 16, 4, 4),
    "sizes": lambda: nn.Unflatten(1, (10, 4, 4)),
    "sizes from the end": lambda: nn.Unflatten(-1, [10, 4, 4]),
    "sizes with a rest": lambda: nn.Unflatten(1, (-1, 4, 4)),
}
UPS = {
    "nothing": nn.Identity,
    "larger": lambda: nn.Upsample(scale_factor=2),
    "smooth": lambda: nn.Upsample(scale_factor=2, mode="bilinear"),
    "pooled": lambda: nn.MaxPool2d(2),
    "padded": lambda: nn.ReflectionPad2d(1),
}
Z = torch.rand(3, 6, dtype=torch.float64)


@pytest.mark.parametrize(("view", "up"), [*((view, "nothing") for view in VIEWS), *(("a width", up) for up in UPS)])
def test_whole_channels_leave(view, up):
    def build():
        return Decoder(VIEWS[view](), UPS[up]).eval()

    torch.manual_seed(0)
    graph, _ = rehearse(build().double(), Z)
    assert {group.name: group.size for group in graph.unlocked} == {"linear": 10, "conv": 7}, str(graph)
    assert graph.group("linear").members["linear.weight", 0].shape == (10, 16)
    check_cuts(build, graph, Z, seeds=6)


@pytest.mark.parametrize("samples", [3, 10])
def test_a_number_in_the_code_locks_them(samples):
    """Of ten samples nine might be made, each of ten channels."""
    graph, _ = rehearse(Decoder(lambda m, x: x.view(-1, 10, 4, 4)).eval(), torch.rand(samples, 6))
    assert "the model fails once it is cut" in str(graph.group("linear").locked)
    assert [group.name for group in graph.unlocked] == ["conv"]


class Volume(nn.Module):
    """Three of four factors are positions."""

    def __init__(self):
        super().__init__()
        self.linear, self.conv, self.head = nn.Linear(6, 5 * 8), nn.Conv3d(5, 4, 3, padding=1), nn.Conv3d(4, 2, 1)

    def forward(self, z):
        return self.head(self.conv(self.linear(z).view(len(z), -1, 2, 2, 2)).relu())


class Pooled(nn.Module):
    """Products of two projections are summed within every output: the terms of a sum are read by no weight, the sums are."""

    def __init__(self):
        super().__init__()
        self.outputs, self.terms = 6, 3
        self.one, self.other, self.head = nn.Linear(6, 18), nn.Linear(6, 18), nn.Linear(6, 3)

    def forward(self, z):
        return self.head((self.one(z) * self.other(z)).view(-1, self.outputs, self.terms).sum(2).tanh())


class Folded(nn.Module):
    """Patches are put together by their taps."""

    def __init__(self):
        super().__init__()
        self.linear, self.head = nn.Linear(6, 5 * 4), nn.Conv2d(5, 3, 3, padding=1)

    def forward(self, z):
        x = self.linear(z).unsqueeze(0).expand(4, -1, -1).permute(1, 2, 0)
        return self.head(F.fold(x, 4, 2, stride=2))


@pytest.mark.parametrize(
    ("build", "sizes"), [(Volume, {"linear": 5, "conv": 4}), (Pooled, {"one": 6}), (Folded, {"linear": 5})]
)
def test_the_factor_that_can_leave_does(build, sizes):
    torch.manual_seed(0)
    graph, _ = rehearse(build().double(), Z)
    assert {group.name: group.size for group in graph.unlocked} == sizes, str(graph)
    check_cuts(build, graph, Z, seeds=6)


def _runs(monkeypatch, model, x):
    found = []
    run = tracer._run
    monkeypatch.setattr(tracer, "_run", lambda *args: found.append(run(*args)) or found[-1])
    return tracer.run(model, x), found


class Blocks(nn.Module):
    """The rows of blocks are normalised by a softmax, and their columns gate a stream that leaves by single channels."""

    def __init__(self):
        super().__init__()
        self.stem, self.gates, self.head = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 3, 1)

    def forward(self, x):
        x = self.stem(x)
        gates = self.gates(x).view(len(x), 2, 4, *x.shape[2:]).softmax(2)
        return self.head(x * gates[:, :, :1].expand(-1, -1, 4, -1, -1).reshape(x.shape))


def test_a_run_that_leaves_larger_pieces_does_not_count(monkeypatch):
    torch.manual_seed(0)
    x = torch.rand(2, 3, 4, 4, dtype=torch.float64)
    state, found = _runs(monkeypatch, Blocks().double(), x)
    assert len(found) == 2
    assert state is found[0]
    (positions, units), (more, fewer) = map(splits._leaving, found)
    assert more > positions
    assert fewer < units


class Chosen(nn.Module):
    """What is split reaches the output, or was locked before: no other factor would leave."""

    def __init__(self, locked):
        super().__init__()
        self.locked, self.inner, self.linear = locked, nn.Linear(6, 9), nn.Linear(9, 12)

    def forward(self, z):
        x = self.linear(self.inner(z).relu())
        if not self.locked:
            return x.view(-1, 3, 4)
        x = x.cumsum(1).view(-1, 3, 4)
        return x.amax(2)


@pytest.mark.parametrize("locked", [False, True])
def test_no_further_run_where_none_can_help(monkeypatch, locked):
    _, found = _runs(monkeypatch, Chosen(locked), torch.rand(2, 6))
    assert len(found) == 1
