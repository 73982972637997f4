"""Mean compensation: a constant unit leaves without changing the function."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from actprune import Budget, Pruner, apply_record, criteria
from actprune.compensation import Mean
from actprune.core.views import Criterion
from zoo import scatter_


class Constant(Criterion):
    """The first units of every group are the worst."""

    def score(self, view):
        return torch.arange(view.size, dtype=torch.float64)


def silence(layer, units):
    """Make units of a layer constant: no weights, only a bias."""
    with torch.no_grad():
        layer.weight[units] = 0
        layer.bias[units] = torch.linspace(0.5, 2, len(units)).to(layer.bias.dtype)


def observed(pruner, batches):
    pruner.model.eval()
    with pruner.observe() as observation, torch.no_grad():
        start = 0
        for batch in batches:
            observation.begin_batch(torch.arange(start, start + len(batch)))
            pruner.model(batch)
            start += len(batch)
    return observation


def prune_first(model, batches, n, optimizers=(), group=None):
    """Remove the first ``n`` units of a group and fold their means; returns the pruner."""
    pruner = Pruner(model, batches[0], Constant(), Budget(params=0.999))
    pruner.execute(drafted(pruner, batches, {group or pruner.graph.unlocked[0].name: list(range(n))}), optimizers)
    return pruner


def drafted(pruner, batches, units):
    """The plan to remove units and to fold their means."""
    from actprune.pruning.plans import compensated, draft

    plan = draft(pruner.model, pruner.graph, units)
    return compensated(plan, pruner.model, pruner.graph, units, observed(pruner, batches), Mean())


def batches(*shape, n=3):
    torch.manual_seed(5)
    return [torch.randn(4, *shape) for _ in range(n)]


def exact(model, data, n, at=slice(None), **options):
    model.eval()
    before = [model(x).detach() for x in data]
    pruner = prune_first(model, data, n, **options)
    for x, y in zip(data, before, strict=True):
        torch.testing.assert_close(model(x)[at], y[at], rtol=1e-5, atol=1e-5)
    return pruner


@pytest.mark.parametrize("bias", [True, False])
def test_linear(bias):
    model = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 3, bias=bias))
    silence(model[0], [0, 1, 2])
    exact(model, batches(5), 3)
    assert model[2].in_features == 5


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kernel", [1, 3])
def test_convolution_without_padding(kernel, bias):
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Sigmoid(), nn.Conv2d(8, 4, kernel, bias=bias), nn.Tanh(), nn.Flatten())
    silence(model[0], [0, 1, 2])
    exact(model, batches(3, 6, 6), 3)


@pytest.mark.parametrize("bias", [True, False])
def test_zero_padded_convolution_is_exact_away_from_the_border(bias):
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Sigmoid(), nn.Conv2d(8, 4, 3, padding=1, bias=bias))
    silence(model[0], [0, 1, 2])
    exact(model, batches(3, 8, 8), 3, at=(..., slice(1, -1), slice(1, -1)))


def test_frames_of_a_video_are_maps_each():
    class Frames(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 4, 3, padding=1)

        def forward(self, x):
            return self.b(F.relu(self.a(x.flatten(0, 1)))).unflatten(0, x.shape[:2])

    model = Frames()
    silence(model.a, [0, 1, 2])
    exact(model, batches(3, 3, 8, 8), 3, at=(..., slice(1, -1), slice(1, -1)))


def test_a_batch_norm_that_follows_takes_the_shift():
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3),
        nn.Sigmoid(),
        nn.Conv2d(8, 5, 1, bias=False),
        nn.BatchNorm2d(5),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(80, 2),
    )
    scatter_(model)
    silence(model[0], [0, 1, 2])
    mean = model[3].running_mean.clone()
    pruner = exact(model, batches(3, 6, 6), 3)
    assert model[2].bias is None
    assert not pruner.record.biases
    assert (model[3].running_mean - mean).abs().min() > 1e-4


def test_a_batch_norm_that_is_not_alone_is_left_alone():
    class Both(nn.Module):
        """The convolution's output is read by the norm and by something else."""

        def __init__(self):
            super().__init__()
            self.a, self.b, self.bn = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 5, 1, bias=False), nn.BatchNorm2d(5)
            self.end = nn.Conv2d(5, 2, 1)

        def forward(self, x):
            y = self.b(torch.sigmoid(self.a(x)))
            return self.end(self.bn(y) + y.tanh())

    model = Both()
    scatter_(model)
    silence(model.a, [0, 1])
    pruner = exact(model, batches(3, 6, 6), 2)
    assert pruner.record.biases == ["b"]


@pytest.mark.parametrize("tokens", [4, 5])
def test_a_batch_norm_over_another_dimension_is_left_alone(tokens):
    """It normalises tokens, of which there may be as many as channels."""
    model = nn.Sequential(nn.Linear(3, 6), nn.Sigmoid(), nn.Linear(6, 4, bias=False), nn.BatchNorm1d(tokens), nn.Tanh())
    scatter_(model)
    silence(model[0], [0, 1])
    pruner = exact(model, batches(tokens, 3), 2, group="0")
    assert pruner.record.biases == ["2"]


def test_batch_norm_between_constant_and_consumer():
    """The constant is what the consumer reads: after norm and activation."""
    model = nn.Sequential(nn.Conv2d(3, 8, 3, bias=True), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3))
    scatter_(model)
    with torch.no_grad():
        model[1].weight[:3] = 0
        model[1].bias[:3] = torch.tensor([0.7, -0.3, 1.1])
    exact(model, batches(3, 6, 6), 3)


def test_a_new_bias_enters_optimizer_record_and_cost():
    model = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 3, bias=False))
    silence(model[0], [0, 1])
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    pruner = exact(model, batches(5), 2, optimizers=[optimizer])
    bias = model[2].bias
    assert bias.requires_grad
    assert any(p is bias for p in optimizer.param_groups[0]["params"])
    assert pruner.record.biases == ["2"]
    assert pruner.record.steps[-1]["params_after"] == pruner.params == sum(p.numel() for p in model.parameters())
    before = bias.detach().clone()
    model(batches(5)[0]).square().sum().backward()
    optimizer.step()
    assert not torch.equal(before, bias)
    fresh = apply_record(nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 3, bias=False)), pruner.record)
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(fresh(batches(5)[0]), model(batches(5)[0]))


def test_a_second_step_shifts_the_bias_that_the_first_one_made():
    model = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 3, bias=False))
    silence(model[0], [0, 1, 2, 3])
    data = batches(5)
    exact(model, data, 2)
    pruner = exact(model, data, 2)
    assert pruner.record.biases == ["2"]
    assert len(pruner.record.steps) == 2


@pytest.mark.parametrize("bias", [True, False])
def test_a_layer_that_runs_twice(bias):
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.shared = nn.Linear(5, 8), nn.Linear(8, 4, bias=bias)

        def forward(self, x):
            y = torch.sigmoid(self.a(x))
            return self.shared(y) + self.shared(y.flip(0)).tanh()

    model = Twice()
    silence(model.a, [0, 1])
    exact(model, batches(5), 2)


@pytest.mark.parametrize("outer", [8, 16])
def test_a_weight_that_is_read_both_ways(outer):
    class Tied(nn.Module):  # an embedding and its transpose
        def __init__(self):
            super().__init__()
            self.a, self.up = nn.Linear(5, 8), nn.Linear(8, outer, bias=False)
            self.mid, self.down = nn.Linear(outer, outer), nn.Linear(8, 3)

        def forward(self, x):
            return self.down(F.linear(F.relu(self.mid(self.up(F.relu(self.a(x))))), self.up.weight.t()))

    model, data = Tied(), batches(5)
    silence(model.a, [0, 1])
    up, mid = model.up.weight, model.mid
    with torch.no_grad():  # of the groups "a" and "mid", nothing but the first layer's constants is read
        for tensor in (model.down.weight[:, :2], up[:3], mid.weight[:3], mid.weight[:, :3], mid.bias[:3]):
            tensor.zero_()
    before = [model(x).detach() for x in data]
    pruner = Pruner(model, data[0], Constant(), Budget(params=0.999))
    pruner.execute(drafted(pruner, data, {"a": [0, 1], "mid": [0, 1, 2]}))
    for x, y in zip(data, before, strict=True):
        torch.testing.assert_close(model(x), y, rtol=1e-5, atol=1e-5)


def test_two_consumers_of_the_same_units():
    class Branches(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Linear(5, 8), nn.Linear(8, 4), nn.Linear(8, 4, bias=False)

        def forward(self, x):
            y = F.relu(self.a(x))
            return torch.tanh(self.b(y)) * self.c(y)

    model = Branches()
    silence(model.a, [0, 1, 2])
    exact(model, batches(5), 3)


@pytest.mark.parametrize("kind", ["packed", "separate"])
def test_heads_are_folded_at_the_output_projection(kind):
    from zoo import Attention

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention, self.out = Attention(6, 3, 2, kind), nn.Linear(6, 2)

        def forward(self, x):
            return self.out(torch.tanh(self.attention(x)))

    model = Net()
    with torch.no_grad():  # the values of head 0 are constants, so is what the projection reads of it
        values = model.attention.qkv if kind == "packed" else model.attention.v
        rows = slice(12, 14) if kind == "packed" else slice(0, 2)
        values.weight[rows] = 0
        values.bias[rows] = torch.tensor([0.8, -1.3])
    heads = "attention.qkv" if kind == "packed" else "attention.q"
    exact(model, batches(5, 6), 1, group=heads)
    assert model.attention.num_heads == 2


def test_flattened_maps():
    model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(96, 4))
    silence(model[0], [0, 1])
    exact(model, batches(3, 6, 6), 2)


def test_transposed_convolution():
    model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.ConvTranspose2d(6, 4, 1))
    silence(model[0], [0, 1])
    exact(model, batches(3, 6, 6), 2)


@pytest.mark.parametrize("layer", [lambda: nn.Conv1d(6, 4, 3, bias=False), lambda: nn.Conv1d(6, 4, 1)])
def test_one_dimension(layer):
    model = nn.Sequential(nn.Conv1d(3, 6, 3), nn.ReLU(), layer())
    silence(model[0], [0, 1])
    exact(model, batches(3, 9), 2)


def test_random_units_against_a_float64_reference_of_the_mean():
    """Not constant: the bias must gain weight times mean over samples and positions, whatever the batches are."""
    torch.manual_seed(1)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3))
    data = [torch.randn(n, 3, 6, 6) + 30 for n in (1, 5, 2)]
    original = copy.deepcopy(model).double()
    prune_first(model, data, 3)
    with torch.no_grad():
        maps = torch.cat([original[:2](x.double()) for x in data])
        mean = maps.mean((0, 2, 3))[:3]
        expected = original[2].bias + original[2].weight[:, :3].sum((2, 3)) @ mean
    torch.testing.assert_close(model[2].bias.double(), expected, rtol=1e-6, atol=1e-6)


def test_a_plain_cut_does_change_the_function():
    """The tests above could not pass without compensation."""
    model = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 3))
    silence(model[0], [0, 1, 2])
    x = batches(5)[0]
    before = model(x).detach()
    pruner = Pruner(model, x, Constant(), Budget(params=0.7), compensation=None)
    pruner.execute(pruner.plan(None))
    assert (model(x) - before).abs().max() > 1e-2


def test_half_precision():
    model = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 3, bias=False)).to(torch.bfloat16)
    silence(model[0], [0, 1])
    data = [x.to(torch.bfloat16) for x in batches(5)]
    before = model(data[0]).detach()
    prune_first(model, data, 2)
    assert model[2].bias.dtype == torch.bfloat16
    torch.testing.assert_close(model(data[0]), before, rtol=0.05, atol=0.05)


def test_compensation_without_observation_is_refused():
    from actprune.core.errors import ObservationError

    model = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 3))
    pruner = Pruner(model, torch.randn(2, 5), criteria.Random(), Budget(params=0.5))
    with pytest.raises(ObservationError, match="Mean compensation needs activations.*compensation=None"):
        pruner.plan(None)
