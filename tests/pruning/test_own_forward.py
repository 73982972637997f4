"""Layers whose class has a forward of its own: what their weight reads is not what the module is given."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from actprune import Budget, criteria, prune
from actprune.capacity import measure
from actprune.compensation import LeastSquares, Mean
from actprune.core.errors import TraceError


class Padding(nn.Conv2d):
    """Pads what it reads itself, as TensorFlow's convolutions do, and says so nowhere."""

    def forward(self, x):
        return super().forward(F.pad(x, (0, 1, 0, 1)))


class ChannelsSecond(nn.Linear):
    def forward(self, maps):
        return F.linear(maps.movedim(1, -1), self.weight, self.bias).movedim(-1, 1)


class Net(nn.Module):
    """The same function with such layers and with plain ones, whose inputs are padded and permuted outside."""

    def __init__(self, own):
        super().__init__()
        self.own = own
        self.a = nn.Conv2d(3, 8, 3)
        self.b = (Padding if own else nn.Conv2d)(8, 8, 3, stride=2)
        self.c = (ChannelsSecond if own else nn.Linear)(8, 6)
        self.head = nn.Linear(6, 3)

    def forward(self, x):
        x = self.a(x).relu()
        x = self.b(x if self.own else F.pad(x, (0, 1, 0, 1))).relu()  # (N, 8, 8, 8): channels are as many as positions
        x = self.c(maps=x) if self.own else self.c(x.movedim(1, -1)).movedim(-1, 1)
        return self.head(x.relu().mean((2, 3)))


REFIT = LeastSquares(refit="once", recalibrate=False)


@pytest.mark.parametrize(
    ("criterion", "compensation"),
    [(criteria.Wanda(), REFIT), (criteria.Wanda(), Mean()), (criteria.Taylor(), None), (criteria.Sensitivity(), None)],
)
def test_what_their_weight_reads_is_observed(criterion, compensation):
    torch.manual_seed(0)
    models, data = [Net(own=False), Net(own=True)], [(torch.randn(32, 3, 18, 18), torch.randint(3, (32,)))]
    models[1].load_state_dict(models[0].state_dict())
    for model in models:
        prune(model, data[0][0][:2], data, criterion=criterion, budget=Budget(units=0.6), compensation=compensation)
    plain, own = (model.state_dict() for model in models)
    for name, values in plain.items():
        torch.testing.assert_close(own[name], values)
    assert sum(values.numel() for values in own.values()) < sum(p.numel() for p in Net(own=True).parameters())


class Casting(nn.Linear):
    """As timm's: the same product, asked of the function."""

    def forward(self, x):
        return F.linear(x, self.weight.to(x.dtype), self.bias)


class Scaling(nn.Linear):
    """Something else than its weight says."""

    def forward(self, x):
        return 1.1 * super().forward(x)


class Flat(nn.Module):
    """Layers with a forward of their own between plain ones, the branch of a residual sum among them."""

    def __init__(self, convolution, linear, padded):
        super().__init__()
        self.stem, self.pads = nn.Conv2d(3, 8, 3), not padded
        self.down, self.branch = convolution(8, 8, 3, stride=2), linear(8, 8)
        self.mid, self.head = linear(8, 12), nn.Linear(12, 3)

    def forward(self, x):
        x = self.stem(x).relu()
        x = self.down(F.pad(x, (0, 1, 0, 1)) if self.pads else x).relu().mean((2, 3))
        return self.head(self.mid(x + self.branch(x)).relu())


def pruned_sequentially(model, state):
    model.load_state_dict(state)
    torch.manual_seed(1)
    x = torch.randn(256, 3, 12, 12)
    prune(model, x[:2], [x], criterion=criteria.Magnitude(), budget=Budget(units=0.6), compensation=LeastSquares())
    return model


@pytest.mark.parametrize("linear", [Casting, Scaling])
def test_those_that_say_what_their_weight_says_are_refitted_sequentially(linear, caplog):
    torch.manual_seed(0)
    plain = Flat(nn.Conv2d, nn.Linear, padded=False)
    state = copy.deepcopy(plain.state_dict())
    plain, own = pruned_sequentially(plain, state), pruned_sequentially(Flat(Padding, linear, padded=True), state)
    x = torch.randn(64, 3, 12, 12)
    if linear is Casting:
        assert not caplog.records
        torch.testing.assert_close(own(x), plain(x), rtol=1e-4, atol=1e-5)
    else:
        assert "2 weights keep what was folded into them once" in caplog.text
        assert "branch.weight, mid.weight" in caplog.text
        assert own.down.weight.shape == plain.down.weight.shape
        torch.testing.assert_close(own.down.weight, plain.down.weight, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("changed", [lambda out: None, lambda out: 1.1 * out], ids=["heard", "changed"])
def test_layers_are_refitted_unless_a_hook_changes_what_they_say(changed, caplog):
    torch.manual_seed(0)
    plain = Flat(nn.Conv2d, nn.Linear, padded=False)
    state = copy.deepcopy(plain.state_dict())
    hooked = Flat(nn.Conv2d, nn.Linear, padded=False)
    for layer in (hooked.branch, hooked.mid):
        layer.register_forward_hook(lambda _module, _args, out: changed(out))
    plain, hooked = pruned_sequentially(plain, state), pruned_sequentially(hooked, state)
    if changed(1.0) is None:
        x = torch.randn(64, 3, 12, 12)
        assert not caplog.records
        torch.testing.assert_close(hooked(x), plain(x), rtol=1e-4, atol=1e-5)
    else:
        assert "branch.weight, mid.weight" in caplog.text


class WithoutBias(nn.Linear):
    def forward(self, x):
        return F.linear(x, self.weight)


def test_a_bias_that_nothing_would_add_is_not_given(caplog):
    torch.manual_seed(0)
    reader = WithoutBias(8, 6, bias=False)
    model, x = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), reader, nn.ReLU(), nn.Linear(6, 2)), torch.randn(64, 4)
    record = prune(model, x[:2], [x], criterion=criteria.Variance(), budget=Budget(units=0.6), compensation=Mean())
    assert "2.weight: no mean is folded" in caplog.text
    assert model[2].bias is None
    assert not record.biases


class Bare(nn.Module):
    """Two units whose sum is constant; what reads them has no bias, so the one cannot stand in for the other's mean."""

    def __init__(self):
        super().__init__()
        self.a, self.weight = nn.Linear(4, 6), nn.Parameter(torch.randn(3, 6))
        with torch.no_grad():
            self.a.weight[1] = -self.a.weight[0]
            self.a.bias[:2] = 5

    def forward(self, x):
        return F.linear(self.a(x), self.weight)


class Last(criteria.Random):
    """Unit 1 leaves first."""

    def score(self, view):
        return (torch.arange(view.size) != 1).double()


def test_a_refit_without_a_bias_costs_no_more_than_plain_cutting():
    torch.manual_seed(0)
    model, x, errors = Bare(), torch.randn(400, 4), []
    target = model(x)
    for how in (None, REFIT):
        cut = copy.deepcopy(model)
        prune(cut, x[:2], [x], criterion=Last(), budget=Budget(units=5 / 6), compensation=how)
        errors.append(float((cut(x) - target).detach().square().mean()))
    assert errors[1] < 0.1 * errors[0]


class Tenfold(nn.Linear):
    def forward(self, x):
        return super().forward(10 * x)


def test_capacity_does_not_take_them_for_their_weight():
    model = nn.Sequential(Tenfold(4, 4), nn.ReLU(), nn.Linear(4, 2))
    with pytest.raises(TraceError, match="addmm in 0 has no Lipschitz constant"):
        measure(model, copy.deepcopy(model), torch.randn(1, 4))
