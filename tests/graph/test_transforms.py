"""Fourier transforms, complex numbers, displaced convolutions, distances, kernels that all channels share."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torchvision.ops import DeformConv2d

from actprune.pruning.verify import rehearse
from masked import check_cuts


class Frequencies(nn.Module):
    """A global filter: every channel is weighted by frequency."""

    def __init__(self, width):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(6, 4, width, 2))

    def forward(self, x):
        y = torch.fft.rfft2(x.permute(0, 2, 3, 1), dim=(1, 2), norm="ortho") * torch.view_as_complex(self.weight)
        return torch.fft.irfft2(y, s=x.shape[-2:], dim=(1, 2), norm="ortho").permute(0, 3, 1, 2)


class Rotated(nn.Module):
    """Rotary attention in complex numbers."""

    def __init__(self, width, heads=2, each=6):
        super().__init__()
        self.parts, self.each = heads, each
        self.q, self.k, self.v = (nn.Linear(width, heads * each) for _ in range(3))
        self.out = nn.Linear(heads * each, width)
        self.register_buffer("angles", torch.rand(36, 1, each // 2))

    def turned(self, x):
        pairs = torch.view_as_complex(x.reshape(*x.shape[:-1], -1, 2))
        return torch.view_as_real(pairs * torch.polar(torch.ones_like(self.angles), self.angles)).flatten(3)

    def forward(self, x):
        shape = x.shape
        q, k, v = (f(x.flatten(2).transpose(1, 2)).view(len(x), -1, self.parts, self.each) for f in (self.q, self.k, self.v))
        q, k, v = (z.transpose(1, 2) for z in (self.turned(q), self.turned(k), v))
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return self.out(y).transpose(1, 2).view(shape)


class Oscillators(nn.Module):
    """A linear recurrence of complex numbers, which are made of two real ones each, or of a length and an angle."""

    def __init__(self, width, n=6):
        super().__init__()
        self.length, self.angle = nn.Parameter(torch.rand(n)), nn.Parameter(torch.rand(n))
        self.into, self.out = nn.Parameter(torch.randn(2, n, width)), nn.Linear(n, width)

    def forward(self, x):
        decay, found = torch.polar(self.length, self.angle), []
        y = x.flatten(2).transpose(1, 2).to(decay.dtype) @ torch.complex(self.into[0], self.into[1]).T
        state = torch.zeros_like(y[:, 0])
        for t in range(y.shape[1]):
            state = decay * state + y[:, t]
            found.append(torch.conj_physical(torch.complex(state.real.relu(), state.imag)).abs())
        return self.out(torch.stack(found, 1)).transpose(1, 2).view(x.shape)


class Displaced(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.offset, self.mask = nn.Conv2d(width, 18, 3, padding=1), nn.Conv2d(width, 9, 1)
        self.conv = DeformConv2d(width, width, 3, padding=1)

    def forward(self, x):
        return self.conv(x, self.offset(x), self.mask(x).sigmoid())


class Distances(nn.Module):
    """How far every position is from learned prototypes."""

    def __init__(self, width):
        super().__init__()
        self.prototypes, self.back = nn.Parameter(torch.randn(5, width)), nn.Linear(5, width)

    def forward(self, x):
        return self.back(torch.cdist(x.flatten(2).transpose(1, 2), self.prototypes)).transpose(1, 2).view(x.shape)


class OneKernel(nn.Module):
    """The same blur for all channels."""

    def __init__(self, _width):
        super().__init__()
        self.register_buffer("kernel", torch.rand(1, 1, 3, 3))

    def forward(self, x):
        return F.conv2d(x, self.kernel.expand(x.shape[1], -1, -1, -1), padding=1, groups=x.shape[1])


class Between(nn.Module):
    def __init__(self, part):
        super().__init__()
        self.stem, self.part, self.head = nn.Conv2d(3, 8, 1), part(8), nn.Conv2d(8, 2, 1)

    def forward(self, x):
        return self.head(self.part(self.stem(x).relu()))


@pytest.mark.parametrize("part", [Frequencies, Rotated, Oscillators, Displaced, Distances, OneKernel])
def test_cut_equals_masked(part):
    x = torch.randn(2, 3, 6, 6, dtype=torch.float64)
    torch.manual_seed(0)
    graph, _ = rehearse(Between(part).double(), x)
    assert any(group.size == 8 for group in graph.unlocked), str(graph)
    assert not graph.unknown
    check_cuts(lambda: Between(part), graph, x, counts=False)


def test_heads_leave_where_pairs_are_rotated():
    graph, _ = rehearse(Between(Rotated), torch.randn(2, 3, 6, 6))
    assert [group.size for group in graph.unlocked if group.name == "part.q"] == [2]
