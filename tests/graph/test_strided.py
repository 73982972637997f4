"""Views by strides: windows that overlap along tokens pass heads and channels on; what a stride cannot follow stays."""

import pytest
import torch
from torch import nn

from actprune.pruning.verify import rehearse
from masked import exact


class Windows(nn.Module):
    """Attention of every token to the windows around it, cut out of the sequence by strides as Longformer does."""

    def __init__(self, view, heads=4, dim=3, width=5):
        super().__init__()
        self.num_heads, self.head_dim, self.view = heads, dim, view
        self.query, self.key, self.value = (nn.Linear(width, heads * dim) for _ in range(3))
        self.out = nn.Linear(heads * dim, 2)

    def forward(self, x):
        n, t, _ = x.shape
        q, k, v = (f(x).view(n, t, self.num_heads, self.head_dim).transpose(1, 2) for f in (self.query, self.key, self.value))
        k, v = (self.view(z.reshape(n * self.num_heads, t, self.head_dim)) for z in (k, v))
        q = q.reshape(n * self.num_heads, 1, t, self.head_dim)
        y = ((q @ k.transpose(-1, -2) / 3).softmax(-1) @ v).mean(1)
        return self.out(y.view(n, self.num_heads, t, self.head_dim).transpose(1, 2).flatten(2))


def overlapping(z):
    """Windows of 4 tokens, of which the next begins two later."""
    z = z.view(z.shape[0], -1, 4, z.shape[-1])
    size, stride = list(z.shape), list(z.stride())
    size[1], stride[1] = 2 * size[1] - 1, stride[1] // 2
    return z.as_strided(size, stride)


def more_dimensions(z):
    z = z.contiguous()
    a, b, c = z.stride()
    return z.as_strided((z.shape[0], 3, 4, z.shape[-1]), (a, 2 * b, b, c))


def fixed(z):
    """The first window, by steps over whole tokens as numbers."""
    return z.view(z.shape[0], -1, 4, z.shape[-1]).as_strided((z.shape[0], 1, 4, 3), (3, 48, 12, 1))


@pytest.mark.parametrize("view", [overlapping, more_dimensions])
@pytest.mark.parametrize("samples", [1, 3])
def test_windows_pass_heads_on(view, samples):
    graph = exact(lambda: Windows(view), torch.randn(samples, 8, 5, dtype=torch.float64))
    assert [group.size for group in graph.unlocked] == [4], str(graph)


def test_steps_that_do_not_follow_are_found():
    """One sample lies token by token with heads side by side: fewer heads, shorter steps. No shape tells."""
    x, model = torch.randn(1, 8, 5), Windows(fixed).eval()
    same = Windows(lambda z: z.view(z.shape[0], -1, 4, z.shape[-1])[:, :1]).eval()
    same.load_state_dict(model.state_dict())
    assert torch.equal(model(x), same(x))
    graph, _ = rehearse(model, x)
    assert all("as_strided is given" in group.locked for group in graph.groups if group.size == 4), str(graph)


class Turned(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner, self.outer = nn.Linear(6, 6), nn.Linear(6, 2)

    def forward(self, x):
        return self.outer(self.inner(x).as_strided((6, 6), (1, 6)).relu())


def test_the_same_shape_turned_is_not_the_same():
    """Rows and columns change places though the shape stays: samples stand where channels were."""
    graph, _ = rehearse(Turned().eval(), torch.randn(6, 6))
    assert "as_strided" in graph.group("inner").locked


class Between(nn.Module):
    """A view by strides between two layers."""

    def __init__(self, view, width=6):
        super().__init__()
        self.inner, self.outer, self.view = nn.Linear(6, width), nn.Linear(width, 2), view

    def forward(self, x):
        return self.outer(self.view(self.inner(x), self.training).relu())


def itself(h, training):
    return h.as_strided(h.shape, h.stride(), h.storage_offset())


def part(h, training):
    """Rows 2 and 3: it begins where its own storage tells."""
    h = h[1:]
    return h.as_strided((2, h.shape[1]), h.stride(), h.storage_offset())


@pytest.mark.parametrize("view", [itself, part])
@pytest.mark.parametrize("width", range(2, 8))
def test_any_share_may_leave_one_unit(view, width):
    """Steps along a single unit say nothing."""
    graph = exact(lambda: Between(view, width), torch.randn(6, 6, dtype=torch.float64))
    assert graph.group("inner").locked is None, str(graph)


def in_place(h, training):
    return h.as_strided_((6, 6), (1, 6))


def in_training(h, training):
    """Steps as numbers, where nothing compares them."""
    return h.repeat(3, 1).as_strided((3, h.shape[1]), (18, 1)) if training else h


@pytest.mark.parametrize("view", [in_place, in_training])
def test_what_cannot_be_told_stays(view):
    x = torch.randn(6, 6)
    model = Between(view)
    model.more = nn.Linear(6, 2)  # which evaluation mode does not run: training mode is followed as well
    graph, _ = rehearse(model.eval(), x)
    assert graph.group("inner").locked is not None, str(graph)


def test_pools_that_change_single_positions_pass():
    """PyTorch restrides what it pools to one position of a map in channels_last."""

    class Pooled(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.outer, self.pool = nn.Conv2d(3, 6, 1), nn.Linear(6, 2), nn.AdaptiveAvgPool2d(1)

        def forward(self, x):
            return self.outer(self.pool(self.inner(x)).flatten(1))

    x = torch.randn(2, 3, 4, 4, dtype=torch.float64).to(memory_format=torch.channels_last)
    graph = exact(Pooled, x)
    assert graph.group("inner").locked is None, str(graph)
