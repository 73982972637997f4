import pytest
import torch
from torch import nn

from actprune.capacity import distance, group_norm, linear_map
from actprune.core.errors import ConfigError


def test_the_reference_value():
    kernel = torch.arange(1, 13, dtype=torch.float64).reshape(2, 3, 1, 2)
    assert float(group_norm(kernel)) == pytest.approx(46.7923028491866, abs=1e-12)


def test_a_matrix_by_hand():
    assert float(group_norm(torch.tensor([[3.0, 4.0], [0.0, 2.0]]))) == pytest.approx(7.0)


def by_loops(weight):
    out, inputs, *window = weight.shape
    flat = weight.reshape(out, inputs, -1)
    return sum(float(flat[o, :, k].square().sum()) ** 0.5 for o in range(out) for k in range(flat.shape[2]))


@pytest.mark.parametrize("layer", [nn.Conv1d(4, 6, 3, groups=2), nn.Conv2d(3, 5, (2, 3)), nn.Conv3d(2, 2, 2)])
def test_convolutions_by_loops(layer):
    before = linear_map(layer, (1,), torch.float64)
    after = before.with_weight(torch.randn_like(before.weight))
    assert distance(after, before) == pytest.approx(by_loops(after.weight - before.weight))


def test_a_transposed_convolution_counts_what_each_output_reads():
    layer = linear_map(nn.ConvTranspose2d(4, 6, 2, groups=2), (1,), torch.float64)
    other = layer.with_weight(torch.zeros_like(layer.weight))
    first, second = layer.weight.chunk(2)
    assert distance(layer, other) == pytest.approx(by_loops(first.transpose(0, 1)) + by_loops(second.transpose(0, 1)))


def test_a_scale_counts_every_channel_alone():
    norm = nn.BatchNorm2d(3, eps=0)
    before = linear_map(norm, (3, 2, 2))
    norm.weight.data = torch.tensor([1.5, -1.0, 1.0])
    assert distance(linear_map(norm, (3, 2, 2)), before) == pytest.approx(2.5)


def test_a_frozen_layer_has_not_moved():
    layer = linear_map(nn.Linear(3, 2), (3,))
    assert distance(layer, layer) == 0.0


def test_shapes_must_agree():
    with pytest.raises(ConfigError, match=r"has shape \(2, 3\), its initialisation \(2, 2\); cut the initial network"):
        distance(linear_map(nn.Linear(3, 2), (3,)), linear_map(nn.Linear(2, 2), (2,)))
