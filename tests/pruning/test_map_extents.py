"""Maps reach the statistics that take them in the extents in which layers read them; HRank, against NumPy map by map."""

import numpy as np
import pytest
import torch
from torch import nn

from actprune import Budget, Pruner
from actprune.criteria import HRank
from actprune.models.vit import ViTTiny

torch.set_num_threads(1)


class Stages(nn.Module):
    """Two resolutions, a convolution that may be grouped, flattened maps, a linear hidden layer."""

    def __init__(self, groups=1, order=(0, 1, 2, 3)):
        super().__init__()
        self.order = order
        self.a = nn.Conv2d(3, 8, 3, padding=1)
        self.b = nn.Conv2d(8, 8, 3, stride=2, padding=1, groups=groups)
        self.f, self.drop = nn.Linear(8 * 4 * 6, 12), nn.Dropout()
        self.h = nn.Linear(12, 4)

    def forward(self, x):
        x = torch.relu(self.b(torch.relu(self.a(x)))).permute(self.order)
        return self.h(torch.relu(self.f(self.drop(x.flatten(1)))))


class Frames(nn.Module):
    """(N, T, 3, H, W): every frame is a row of the convolutions; then tokens in windows, then a whole sequence."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 5, 4, stride=4)
        self.c, self.d, self.e = nn.Linear(5, 7), nn.Linear(7, 9), nn.Linear(9, 2)

    def forward(self, x):
        n, t = x.shape[:2]
        x = torch.relu(self.b(torch.relu(self.a(x.flatten(0, 1)))))
        x = torch.relu(self.c(x.flatten(2).transpose(1, 2)))  # (N T, L, C)
        x = torch.relu(self.d(x).unflatten(0, (n, t)).flatten(1, 2))
        return self.e(x)


class Video(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv3d(2, 5, 3, padding=1), nn.Conv3d(5, 2, 3)

    def forward(self, x):
        return self.b(torch.relu(self.a(x)))


def hrank(model, x):
    """The scores that the package gives, and by path of the layer that reads what it read, (N, ...) in float64."""
    seen = {}
    pruner = Pruner(model.eval(), x[:2], HRank(), Budget(units=0.99), compensation=None)
    hooks = [
        layer.register_forward_pre_hook(lambda _, args, path=path: seen.update({path: args[0].double().numpy()}))
        for path, layer in model.named_children()
    ]
    with pruner.observe() as observation, torch.no_grad():
        observation.begin_batch(torch.arange(len(x)))
        model(x)
    for hook in hooks:
        hook.remove()
    return pruner.scores(observation), seen


def ranks(maps):
    """(N, C, ...) -> mean rank per channel over all that comes before the last two dimensions."""
    return np.linalg.matrix_rank(maps, tol=1e-5 * np.abs(maps).max()).reshape(*maps.shape[:2], -1).mean((0, 2))


def vectors(x):
    """(N, C, M, L) -> mean over N and M of whether a vector is not zero."""
    return (x != 0).any(3).mean((0, 2))


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (0, 2, 3, 1)], ids=["channels first", "channels last"])
def test_two_resolutions_flattened_maps_and_a_linear_layer(order):
    torch.manual_seed(0)
    scores, seen = hrank(Stages(order=order), torch.randn(9, 3, 8, 12))
    assert np.allclose(scores["a"], ranks(seen["b"]))
    maps = np.moveaxis(seen["f"].reshape(9, 4, 6, 8), 3, 1) if order[1] == 2 else seen["f"].reshape(9, 8, 4, 6)
    assert np.allclose(scores["b"], ranks(maps))
    assert 0 < scores["b"].min() < scores["b"].max() <= 4
    assert np.allclose(scores["f"], (seen["h"] != 0).mean(0))


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (0, 2, 3, 1)], ids=["channels first", "channels last"])
def test_units_of_several_channels_have_the_mean_of_their_ranks(order):
    """The grouped layer's inputs and outputs leave group by group: each unit is 4 channels, and is read twice."""
    torch.manual_seed(0)
    model, x = Stages(groups=2, order=order), torch.randn(9, 3, 8, 12)
    scores, seen = hrank(model, x)
    maps = np.moveaxis(seen["f"].reshape(9, 4, 6, 8), 3, 1) if order[1] == 2 else seen["f"].reshape(9, 8, 4, 6)
    sites = [ranks(maps_).reshape(-1, 4) for maps_ in (seen["b"], maps)]
    unit = [[0, 1, 2, 3], [4, 5, 6, 7]]
    pruner = Pruner(model, x[:2], HRank(), Budget(units=0.99), compensation=None)
    group = next(group for group in pruner.graph.unlocked if group.name == "a")
    assert group.sites[0].positions.tolist() == unit
    means = [site.mean(1) for site in sites]
    expected = np.mean([m.mean() for m in means]) * np.max([m / m.mean() for m in means], axis=0)
    assert np.allclose(scores["a"], expected)


def test_frames_and_windows_are_maps_of_their_own():
    torch.manual_seed(0)
    n, t = 3, 4
    scores, seen = hrank(Frames(), torch.randn(n, t, 3, 8, 12))
    assert np.allclose(scores["a"], ranks(seen["b"]))
    for name, reader in (("b", "c"), ("c", "d")):
        windows = seen[reader].reshape(n, t, *seen[reader].shape[1:])
        assert np.allclose(scores[name], vectors(np.moveaxis(windows, 3, 1)))
    assert np.allclose(scores["d"], vectors(np.moveaxis(seen["e"][:, None], 3, 1)))


def test_of_a_video_every_frame_is_a_map():
    torch.manual_seed(0)
    scores, seen = hrank(Video(), torch.randn(4, 2, 3, 8, 5))
    assert np.allclose(scores["a"], ranks(seen["b"]))


@pytest.mark.parametrize("pool", ["mean", "cls"])
def test_tokens_are_vectors_whatever_their_number(pool):
    """With and without a class token; behind a GELU nothing is exactly zero."""
    torch.manual_seed(0)
    model = ViTTiny(num_classes=5, image_size=16, patch_size=4, dim=16, depth=2, num_heads=4, pool=pool)
    scores, _ = hrank(model, torch.randn(4, 3, 16, 16))
    assert scores
    assert all(score.tolist() == [1.0] * len(score) for score in scores.values())
