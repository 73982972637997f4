"""Constants of layers equal the largest singular value of their explicit matrices."""

import pytest
import torch
from torch import nn

from actprune.capacity import batch_norm_scale, linear_map, lipschitz_constant
from actprune.capacity.lipschitz import blocks, is_circulant, on_grid
from actprune.capacity.singular import largest_singular_value
from actprune.core.errors import ConfigError
from capacity.dense import matrix, of_module

SHAPE = (4, 7, 6)
PADDINGS = [
    {"padding": 0},
    {"padding": 1},
    {"padding": (2, 0)},
    {"padding": "same"},
    {"padding": 1, "padding_mode": "circular"},
    {"padding": 2, "padding_mode": "circular"},
    {"padding": 1, "padding_mode": "reflect"},
    {"padding": 1, "padding_mode": "replicate"},
]
OPTIONS = [{}, {"stride": 2}, {"stride": (1, 3)}, {"dilation": 2}, {"groups": 2}, {"stride": 2, "dilation": 2, "groups": 4}]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("padding", PADDINGS, ids=str)
def test_convolutions(padding, options):
    if padding["padding"] == "same" and "stride" in options:
        padding = {"padding": 1}
    torch.manual_seed(0)
    layer = nn.Conv2d(4, 8, 3, **padding, **options)
    assert lipschitz_constant(linear_map(layer, SHAPE, torch.float64)) == pytest.approx(of_module(layer, SHAPE), rel=1e-5)


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.Conv1d(3, 5, 4, padding=2, padding_mode="circular"), (3, 9)),
        (nn.Conv1d(3, 5, 5, stride=2, padding=1), (3, 9)),
        (nn.Conv3d(2, 3, 3, padding=1), (2, 3, 4, 3)),
        (nn.Conv3d(2, 3, 3, padding=1, padding_mode="circular"), (2, 3, 4, 3)),
        (nn.Conv2d(4, 6, 1, stride=2), (4, 5, 5)),
        (nn.Conv2d(4, 6, 1, groups=2), (4, 5, 5)),
        (nn.Conv2d(4, 6, 1, padding=1, stride=2), (4, 5, 5)),
        (nn.Conv2d(4, 4, 3, padding=1, groups=4), (4, 5, 5)),
        (nn.Conv2d(2, 3, 5, padding=2, padding_mode="circular"), (2, 3, 3)),
        (nn.Conv2d(2, 3, 4, padding=3, dilation=2, padding_mode="circular"), (2, 5, 6)),
        (nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1, output_padding=1, groups=2), (4, 4, 3)),
        (nn.ConvTranspose1d(3, 2, 4, dilation=2), (3, 6)),
        (nn.Linear(7, 5), (7,)),
        (nn.Linear(1, 5), (1,)),
        (nn.Conv2d(1, 1, 3), (1, 3, 3)),
    ],
    ids=str,
)
def test_other_layers(layer, shape):
    assert lipschitz_constant(linear_map(layer, shape, torch.float64)) == pytest.approx(of_module(layer, shape), rel=1e-5)


def test_single_precision_is_enough_for_four_digits():
    torch.manual_seed(0)
    layer = nn.Conv2d(4, 8, 3, padding=1, stride=2)
    single = lipschitz_constant(linear_map(layer, SHAPE))
    assert single == pytest.approx(of_module(layer, SHAPE), rel=1e-4)


def test_all_singular_values_of_circular_convolutions():
    torch.manual_seed(0)
    layer = linear_map(nn.Conv2d(4, 6, 3, padding=1, padding_mode="circular", groups=2), (4, 4, 5), torch.float64)
    assert is_circulant(layer)
    values = torch.linalg.svdvals(torch.fft.fftn(on_grid(layer), dim=(2, 3)).reshape(2, 3, 2, 20).permute(0, 3, 1, 2))
    reference = torch.linalg.svdvals(matrix(layer, (4, 4, 5)))
    found = values.flatten().sort(descending=True).values
    torch.testing.assert_close(found, reference[: len(found)])
    assert torch.linalg.svdvals(blocks(on_grid(layer), 2)).max() == pytest.approx(float(reference[0]))


@pytest.mark.parametrize(
    ("options", "circulant"),
    [
        ({"padding": 1}, True),
        ({"padding": 2}, False),
        ({"padding": 1, "stride": 2}, False),
        ({"padding": 2, "dilation": 2}, True),
    ],
)
def test_what_is_diagonal_in_fourier_space(options, circulant):
    assert is_circulant(linear_map(nn.Conv2d(2, 2, 3, padding_mode="circular", **options), (2, 6, 6))) is circulant


def test_a_stride_makes_a_circular_convolution_smaller():
    """The official code iterates without the stride and gets the larger constant."""
    torch.manual_seed(0)
    kernel = nn.Conv2d(4, 4, 3, padding=1, padding_mode="circular")
    strided = nn.Conv2d(4, 4, 3, padding=1, padding_mode="circular", stride=2)
    strided.load_state_dict(kernel.state_dict())
    shape = (4, 6, 6)
    assert lipschitz_constant(linear_map(strided, shape)) < 0.95 * lipschitz_constant(linear_map(kernel, shape))


@pytest.mark.parametrize(
    "layer", [nn.Conv2d(2, 3, 3, padding=1), nn.Conv2d(2, 3, 3, padding=1, padding_mode="circular"), nn.Linear(2, 3)]
)
def test_zero_weights(layer):
    nn.init.zeros_(layer.weight)
    assert lipschitz_constant(linear_map(layer, (2, 4, 4))) == 0.0


@pytest.mark.parametrize("affine", [True, False])
def test_batch_norm_in_evaluation_mode(affine):
    torch.manual_seed(0)
    norm = nn.BatchNorm2d(5, affine=affine)
    norm.running_var.uniform_(0.5, 2)
    norm.running_mean.normal_()
    if affine:
        nn.init.normal_(norm.weight)
    assert lipschitz_constant(linear_map(norm, (5, 2, 2))) == pytest.approx(of_module(norm, (5, 2, 2)), rel=1e-6)


def test_a_batch_norm_behind_a_layer():
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4))
    layers[1].running_var.uniform_(0.2, 3)
    nn.init.normal_(layers[1].weight)
    both = linear_map(layers[0], (3, 4, 4), torch.float64).scaled(batch_norm_scale(layers[1], torch.float64))
    assert lipschitz_constant(both) == pytest.approx(of_module(layers, (3, 4, 4)), rel=1e-5)


def test_ascent_on_the_ratio_reaches_the_constant():
    """The official test of a layer: the largest ||f(x) - f(y)|| / ||x - y|| that gradient ascent finds, to two decimals."""
    torch.manual_seed(0)
    layer = nn.Conv2d(3, 5, 3, padding=1, stride=2)
    x = torch.randn(2, 3, 6, 6, requires_grad=True)
    optimizer = torch.optim.Adam([x], lr=0.05)
    for _ in range(300):
        optimizer.zero_grad()
        ratio = (layer(x)[0] - layer(x)[1]).norm() / (x[0] - x[1]).norm()
        (-ratio).backward()
        optimizer.step()
    assert ratio.item() == pytest.approx(lipschitz_constant(linear_map(layer, (3, 6, 6))), abs=5e-3)


def test_a_start_is_used_and_a_zero_one_replaced():
    values = torch.linspace(1, 2, 300, dtype=torch.float64)
    sigma, v = largest_singular_value(lambda x: values * x, (300,), like=values)
    assert sigma == pytest.approx(2, rel=1e-5)
    calls = []

    def counted(x):
        calls.append(1)
        return values * x

    again, _ = largest_singular_value(counted, (300,), like=values, start=v)
    warm = len(calls)
    assert again >= sigma - 1e-12
    zero, _ = largest_singular_value(counted, (300,), like=values, start=torch.zeros(300))
    assert zero == pytest.approx(2, rel=1e-5)
    assert len(calls) - warm > warm


def test_what_does_not_converge_says_so():
    values = torch.linspace(0, 1, 3000, dtype=torch.float64).sqrt()
    with pytest.warns(UserWarning, match="relative residual"):
        largest_singular_value(lambda x: values * x, (3000,), like=values, tolerance=1e-14)


def test_errors():
    with pytest.raises(ConfigError, match="ReLU is no linear map"):
        linear_map(nn.ReLU(), (3,))
    with pytest.raises(ConfigError, match="track_running_stats=False"):
        linear_map(nn.BatchNorm1d(3, track_running_stats=False), (3,))
