"""How networks compose: constants along chains, residual blocks and concatenations, against hand computation and Jacobians."""

import copy
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from actprune.capacity import effective, follow, linear_map, lipschitz_constant, measure
from actprune.core.errors import ConfigError, TraceError
from actprune.models.resnet import CifarResNet
from actprune.models.small_cnn import SmallCNN
from capacity.dense import constant

IMAGE = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class Function(nn.Module):
    """A network of one function."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


def test_a_chain_is_a_product():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 2, 3, stride=2), nn.Flatten(), nn.Linear(18, 5))
    found = measure(net, copy.deepcopy(net), IMAGE)
    own = [
        lipschitz_constant(linear_map(net[i], shape, torch.float64))
        for i, shape in ((0, (3, 8, 8)), (2, (4, 8, 8)), (4, (18,)))
    ]
    assert [layer.name for layer in found.layers] == ["0", "2", "4"]
    assert [layer.lipschitz for layer in found.layers] == pytest.approx(own)
    assert found.lipschitz == pytest.approx(math.prod(own))
    assert [layer.before for layer in found.layers] == pytest.approx([1, own[0], own[0] * own[1]])
    assert [layer.after for layer in found.layers] == pytest.approx([own[1] * own[2], own[2], 1])
    assert found.complexity == found.distance == 0


def test_a_residual_network_by_hand():
    """The paper: a block has Lip(shortcut) + Lip(conv1) Lip(conv2)."""
    torch.manual_seed(0)
    net = SmallCNN(10)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_var.uniform_(0.5, 2)
            nn.init.uniform_(module.weight, 0.5, 2)
    initial = SmallCNN(10)
    found = measure(net, initial, torch.randn(1, 1, 8, 8))
    s = {layer.name: layer.lipschitz for layer in found.layers}
    first = 1 + s["stages.0.0.conv1"] * s["stages.0.0.conv2"]
    second = s["stages.1.0.shortcut.0"] + s["stages.1.0.conv1"] * s["stages.1.0.conv2"]
    pool = 1 / 4  # of 4 x 4 positions
    assert found.lipschitz == pytest.approx(s["conv"] * first * second * pool * s["linear"])
    by = {layer.name: layer for layer in found.layers}
    around = s["conv"] * first * pool * s["linear"] * s["stages.1.0.conv1"]
    assert by["stages.1.0.conv2"].influence == pytest.approx(around * by["stages.1.0.conv2"].distance)
    assert all(layer.batch_norm for layer in found.layers if layer.name != "linear")
    assert found.complexity == pytest.approx(sum(layer.influence ** (2 / 3) for layer in found.layers) ** 1.5)


def test_it_bounds_what_the_network_does():
    torch.manual_seed(0)
    net = SmallCNN(10, widths=(4, 6)).eval().double()
    bound = measure(net, net, torch.randn(1, 1, 8, 8, dtype=torch.float64)).lipschitz
    for scale in (0.1, 1, 10):
        x = scale * torch.randn(1, 1, 8, 8, dtype=torch.float64)
        jacobian = torch.autograd.functional.jacobian(net, x).reshape(10, 64)
        assert float(torch.linalg.matrix_norm(jacobian, 2)) <= bound


def test_a_positive_chain_attains_it():
    """One filter of ones, positive images: no ReLU acts, and the bound of the two layers is that of their product."""
    net = nn.Sequential(nn.Linear(1, 1), nn.ReLU(), nn.Linear(1, 1)).double()
    for layer in (net[0], net[2]):
        nn.init.constant_(layer.weight, 3)
    x = torch.full((1, 1), 2.0, dtype=torch.float64, requires_grad=True)
    net(x).backward()
    assert measure(net, net, x.detach()).lipschitz == pytest.approx(float(x.grad)) == 9


def test_it_is_left_as_it_was():
    net = SmallCNN(10).train()
    before = copy.deepcopy(net.state_dict())
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in net.modules()]
    measure(net, net, torch.randn(1, 1, 8, 8))
    assert net.training
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert hooks == [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in net.modules()]


def test_a_shortcut_of_slices_and_zeros_has_constant_1():
    net = CifarResNet(8)
    found = measure(net, net, torch.randn(1, 3, 16, 16))
    s = {layer.name: layer.lipschitz for layer in found.layers}
    blocks = [1 + s[f"layer{k}.0.conv1"] * s[f"layer{k}.0.conv2"] for k in (1, 2, 3)]
    assert found.lipschitz == pytest.approx(s["conv1"] * math.prod(blocks) * s["linear"] / 4)


LINEAR = {
    "mean over positions": lambda x: x.mean((2, 3)),
    "sum over channels": lambda x: x.sum(1),
    "adaptive average to 1": lambda x: F.adaptive_avg_pool2d(x, 1),
    "average of 2": lambda x: F.avg_pool2d(x, 2),
    "zeros": lambda x: F.pad(x, (1, 2, 0, 1)),
    "reflection": lambda x: F.pad(x, (2, 1, 1, 1), mode="reflect"),
    "replication": lambda x: F.pad(x, (2, 0, 1, 1), mode="replicate"),
    "nearest": lambda x: F.interpolate(x, scale_factor=2),
    "a slice": lambda x: x[:, 1:, ::2],
    "a permutation": lambda x: x.permute(0, 2, 3, 1).flatten(1).roll(3, 1),
    "twice": lambda x: torch.cat([x, x], 1),
    "stacked": lambda x: torch.stack([x, -x]),
    "a difference": lambda x: x - 0.5 * x,
    "a constant factor": lambda x: 3 * x / 2,
    "repeated": lambda x: x.unsqueeze(2).expand(-1, -1, 5, -1, -1),
}
LOOSE = {
    "adaptive average to 3": lambda x: F.adaptive_avg_pool2d(x, 3),
    "overlapping average": lambda x: F.avg_pool2d(x, 3, 2, padding=1),
    "rounded up": lambda x: F.avg_pool2d(x, 2, 2, padding=1, ceil_mode=True),
    "average without zeros": lambda x: F.avg_pool2d(x, 3, 2, padding=1, count_include_pad=False),
    "average with a divisor": lambda x: F.avg_pool2d(x, 2, divisor_override=3),
    "halves": lambda x: torch.cat(x.flatten(1).chunk(2, 1), 1),
}


@pytest.mark.parametrize("name", LINEAR)
def test_linear_operators_have_their_own_constant(name):
    bound = measure(Function(LINEAR[name]), nn.Identity(), IMAGE[:, :, :6, :6]).lipschitz
    expected = constant(lambda x: LINEAR[name](x[None]), (3, 6, 6))
    if name == "a difference":  # 1 + 0.5: what a sum cancels is not seen
        assert (bound, expected) == (1.5, 0.5)
    else:
        assert bound == pytest.approx(expected)


@pytest.mark.parametrize("name", LOOSE)
def test_other_operators_are_bounded(name):
    bound = measure(Function(LOOSE[name]), nn.Identity(), IMAGE[:, :, :7, :7]).lipschitz
    expected = constant(lambda x: LOOSE[name](x[None]), (3, 7, 7))
    assert expected <= bound + 1e-12
    assert bound <= 1.5 * expected


POOLS = {
    "3, 2": (lambda x: F.max_pool2d(x, 3, 2, padding=1), 4),
    "2, 2": (lambda x: F.max_pool2d(x, 2), 1),
    "3, 1": (lambda x: F.max_pool2d(x, 3, 1), 9),
    "2, 1, 2": (lambda x: F.max_pool2d(x, 2, 1, dilation=2), 4),
    "adaptive": (lambda x: F.adaptive_max_pool2d(x, 3), 4),
}


@pytest.mark.parametrize("name", POOLS)
def test_one_pixel_may_win_every_window(name):
    """The official code takes 1 for the overlapping pools of its networks."""
    function, windows = POOLS[name]
    image = torch.zeros(1, 1, 7, 7)
    image[0, 0, 3 if name != "adaptive" else 2, 3 if name != "adaptive" else 2] = 1
    bound = measure(Function(function), nn.Identity(), image).lipschitz
    assert bound == pytest.approx(math.sqrt(windows)) == pytest.approx(float(function(image).norm()))


SLOPES = {
    "relu": F.relu, "relu6": F.relu6, "leaky": lambda x: F.leaky_relu(x, 0.1), "steep": lambda x: F.leaky_relu(x, 3.0),
    "elu": lambda x: F.elu(x, 2.0), "selu": F.selu, "gelu": F.gelu, "silu": F.silu, "hardswish": F.hardswish, "mish": F.mish,
    "sigmoid": torch.sigmoid, "hardsigmoid": F.hardsigmoid, "tanh": torch.tanh, "softplus": F.softplus,
    "clamp": lambda x: x.clamp(-1, 1),
}  # fmt: skip


@pytest.mark.parametrize("name", SLOPES)
def test_activation_functions_have_their_steepest_slope(name):
    x = torch.linspace(-12, 12, 240_001, dtype=torch.float64, requires_grad=True)
    SLOPES[name](x).sum().backward()
    bound = measure(Function(SLOPES[name]), nn.Identity(), torch.randn(1, 4, dtype=torch.float64)).lipschitz
    assert float(x.grad.abs().max()) <= bound + 1e-8
    assert bound == pytest.approx(float(x.grad.abs().max()), rel=1e-3)


def test_in_place_operators():
    net = nn.Sequential(nn.Linear(4, 4), nn.ReLU(inplace=True), nn.Unflatten(1, (2, 2)), nn.Flatten(), nn.Linear(4, 2))
    s = [lipschitz_constant(linear_map(net[i], (4,), torch.float64)) for i in (0, 4)]
    assert measure(net, net, torch.randn(3, 4)).lipschitz == pytest.approx(s[0] * s[1])

    def add(x):
        y = x + 0
        y += x
        return y

    assert measure(Function(add), nn.Identity(), torch.randn(3, 4)).lipschitz == pytest.approx(2)


class Twice(nn.Module):
    """One layer that is called two times."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x):
        return self.layer(torch.tanh(self.layer(x)))


def test_a_layer_that_is_called_twice():
    net = Twice()
    found = measure(net, net, torch.randn(2, 4))
    assert [layer.name for layer in found.layers] == ["layer", "layer#2"]
    assert found.lipschitz == pytest.approx(found.layers[0].lipschitz ** 2)


class Apart(nn.Module):
    """The convolution's output is read by its batch norm and by the sum."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 1)
        self.bn = nn.BatchNorm2d(3)

    def forward(self, x):
        x = self.conv(x)
        return x + self.bn(x)


def test_a_batch_norm_that_is_not_alone_is_a_layer_of_its_own():
    net = Apart()
    net.bn.weight.data.fill_(2)
    initial = copy.deepcopy(net)
    initial.bn.weight.data.fill_(1)
    found = measure(net, initial, IMAGE)
    assert [(layer.name, layer.batch_norm) for layer in found.layers] == [("conv", None), ("bn", None)]
    assert found.lipschitz == pytest.approx(found.layers[0].lipschitz * (1 + found.layers[1].lipschitz))
    assert found.layers[1].distance == pytest.approx(3 / math.sqrt(1 + 1e-5))


def test_a_batch_norm_counts_with_its_layer():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    initial = copy.deepcopy(net)
    net[1].weight.data.normal_()
    (layer,) = measure(net, initial, IMAGE).layers
    kernels = [effective(model, follow(net, IMAGE).uses[0]).weight for model in (net, initial)]
    change = (net[1].weight - initial[1].weight).detach().double() / math.sqrt(1 + 1e-5)
    assert layer.distance == pytest.approx(
        float((net[0].weight.detach().double() * change[:, None, None, None]).norm(dim=1).sum())
    )
    assert layer.distance == pytest.approx(float((kernels[0] - kernels[1]).norm(dim=1).sum()))


@pytest.mark.parametrize(
    ("net", "message"),
    [
        (nn.Sequential(nn.LayerNorm(8)), "native_layer_norm in 0 has no Lipschitz constant here"),
        (Function(lambda x: x * x), "mul in the model multiplies two activations"),
        (Function(lambda x: x / (1 + x.abs())), "div in the model divides by an activation"),
        (Function(lambda x: x @ torch.ones(8, 2)), "no Lipschitz constant here; capacity knows networks of"),
        (Function(lambda x: torch.zeros(2)), "no output of the model depends on its inputs"),
        (nn.Sequential(nn.Linear(3, 3)), "the model failed on the example inputs: RuntimeError"),
    ],
)
def test_what_has_no_constant_is_refused_by_name(net, message):
    with pytest.raises(TraceError, match=message):
        measure(net, net, IMAGE)


def doubled(x):
    y = x + 0
    y[:, 1:].add_(y[:, :-1].clone())
    return y


def assigned(x):
    y = torch.zeros(2, 4, 8, 8)
    y[:, 1:] = x
    return y


def stretched(x):
    y = x + 0
    F.hardswish(y[:, 1:], inplace=True)
    return y


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (doubled, "add_ in .* writes to a part of another tensor"),
        (assigned, "copy_ in .* has no Lipschitz constant here"),
        (stretched, "hardswish_ in .* writes to a part of another tensor"),
    ],
)
def test_writing_to_a_part_is_refused(function, message):
    with pytest.raises(TraceError, match=message):
        measure(Function(function), nn.Identity(), IMAGE)


def test_other_initial_networks_are_refused():
    net = nn.Sequential(nn.Linear(4, 3))
    with pytest.raises(ConfigError, match="0: the weight has shape"):
        measure(net, nn.Sequential(nn.Linear(4, 2)), torch.randn(1, 4))
    with pytest.raises(ConfigError, match="the initial network has no 0"):
        measure(net, nn.Linear(4, 3), torch.randn(1, 4))
    nn.init.constant_(net[0].weight, math.nan)
    with pytest.raises(ConfigError, match="0 has NaN or infinite weights"):
        measure(net, net, torch.randn(1, 4))


def test_zero_weights_and_single_units():
    net = nn.Sequential(nn.Conv2d(3, 1, 3), nn.ReLU(), nn.Conv2d(1, 1, 1), nn.Flatten(), nn.Linear(36, 1))
    initial = copy.deepcopy(net)
    nn.init.zeros_(net[2].weight)
    found = measure(net, initial, IMAGE)
    assert found.lipschitz == 0
    assert found.layers[2].before == 0
    assert found.layers[1].distance == pytest.approx(float(initial[2].weight.detach().abs()))
    assert found.complexity == pytest.approx(found.layers[1].influence)
