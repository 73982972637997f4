"""Criteria that look at the weights or norms around a unit: what they do where there are none, and what the weights are."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from actprune import trace
from actprune.core.errors import ObservationError
from actprune.core.views import GroupView
from actprune.criteria import FLAP, BatchNormScale, Reconstruction, Wanda, combine
from actprune.pruning.weights import columns_of, norms_of
from zoo import build


def statistic(seed, scale=1.0):
    x = scale * torch.randn(7, 4, 3, generator=torch.Generator().manual_seed(seed))
    moments = FLAP().statistics()["moments"](4)
    moments.update(x, torch.arange(7))
    return moments, x.double()


def test_sites_that_no_weight_reads_are_left_out():
    (one, x), (two, _), (three, z) = statistic(0), statistic(1), statistic(2, 9.0)
    weights = [torch.rand(4, 5), None, torch.rand(4, 2)]
    view = GroupView("g", 4, {"moments": [one, two, three]}, columns=lambda: weights)
    a, c = (w.double() for w in weights[::2])
    flap = [x.var((0, 2), correction=0) * a.square().sum(1), z.var((0, 2), correction=0) * c.square().sum(1)]
    torch.testing.assert_close(FLAP().score(view), combine(flap), rtol=1e-6, atol=0)
    wanda = [x.square().mean((0, 2)).sqrt() * a.sum(1), z.square().mean((0, 2)).sqrt() * c.sum(1)]
    torch.testing.assert_close(Wanda().score(view), combine(wanda), rtol=1e-6, atol=0)


@pytest.mark.parametrize("criterion", [FLAP(), Wanda(), BatchNormScale(), Reconstruction()])
def test_a_group_with_nothing_to_go_by_has_no_score(criterion):
    moments, _ = statistic(0)
    view = GroupView("g", 4, {"moments": [moments]}, columns=lambda: [None])
    assert criterion.score(view) is None
    assert not criterion.may_score(view) or criterion.needs_readers


def test_statistics_and_weights_of_different_models_are_refused():
    moments, _ = statistic(0)
    with pytest.raises(ObservationError, match="group g has 1 sites and the weights of 2; a view needs both of the same model"):
        FLAP().score(GroupView("g", 4, {"moments": [moments]}, columns=lambda: [None, None]))


class Readers(nn.Module):
    """A convolution that is read by an ordinary and a transposed one, flattened by a linear layer, and by a bare product."""

    def __init__(self):
        super().__init__()
        self.a = nn.Conv2d(2, 6, 1)
        self.plain, self.transposed = nn.Conv2d(6, 3, 3), nn.ConvTranspose2d(6, 5, 2)
        self.linear, self.bare = nn.Linear(6 * 9, 4), nn.Parameter(torch.randn(6, 7))

    def forward(self, x):
        x = torch.tanh(self.a(x))
        return (
            self.plain(x).sum((2, 3)),
            self.transposed(x).sum((2, 3)),
            self.linear(x.flatten(1)),
            x.mean((2, 3)) @ self.bare,
        )


def test_columns_are_the_weights_that_multiply_the_unit():
    """Independent of any layout: the derivative of the consumer's output with respect to its weight is the unit's input."""
    torch.manual_seed(0)
    model, x = Readers().eval(), torch.randn(2, 2, 3, 3)
    graph = trace(model, x)
    group = graph.group("a")
    columns = dict(zip((s.name for s in group.sites), columns_of(model, graph, group), strict=True))
    for unit in range(6):
        only = torch.zeros(1, 6, 3, 3)
        only[:, unit] = 1
        expected = {
            "plain": model.plain.weight[:, unit],
            "transposed": model.transposed.weight[unit],
            "linear": model.linear.weight[:, only[0].flatten() > 0],
            "": model.bare[unit],
        }
        for name, weight in expected.items():
            ours = columns[name][unit]
            assert ours.dtype == torch.float64
            torch.testing.assert_close(ours.sort().values, weight.detach().double().flatten().sort().values)


@pytest.mark.parametrize("groups", [2, 4])
def test_columns_of_grouped_convolutions(groups):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU(), nn.Conv2d(8, 12, 1, groups=groups), nn.ReLU(), nn.Conv2d(12, 2, 1))
    x = torch.randn(1, 3, 2, 2)
    graph = trace(model, x)
    group = next(g for g in graph.groups if ("0.weight", 0) in g.members)
    number = [site.module for site in group.sites].index("2")
    columns = columns_of(model, graph, group)[number]
    channels = torch.from_numpy(group.sites[number].positions)
    dense = torch.zeros(8, 12)
    for channel in range(8):
        impulse = torch.zeros(1, 8, 1, 1)
        impulse[0, channel] = 1
        dense[channel] = F.conv2d(impulse, model[2].weight, groups=groups).flatten().detach()
    for unit in range(group.size):
        ours, expected = columns[unit], dense[channels[unit]].double().flatten()
        assert ours.square().sum().item() == pytest.approx(expected.square().sum().item())
        assert ours.abs().sum().item() == pytest.approx(expected.abs().sum().item())


def test_a_weight_that_is_computed_by_the_layer_counts_as_it_is():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.utils.parametrizations.weight_norm(nn.Linear(8, 6)))
    graph = trace(model, torch.randn(3, 5))
    (columns,) = columns_of(model, graph, graph.group("0"))
    assert torch.equal(columns, model[2].weight.detach().T.double())


@pytest.mark.parametrize("name", ["WeightStandardised", "WeightNormLinear"])
def test_a_weight_that_is_computed_on_the_way_is_none_of_the_layers_own(name):
    """By the module around the convolution, or in a linear layer's own forward."""
    model, x = build(name)
    graph = trace(model, x)
    assert any(columns is None for g in graph.unlocked for columns in columns_of(model, graph, g))


def test_norms_are_those_the_units_go_through():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 5, 1), nn.BatchNorm2d(5), nn.ReLU(), nn.Conv2d(5, 4, 1), nn.GroupNorm(2, 4), nn.Flatten()
    )
    model.append(nn.Linear(16, 3)).append(nn.BatchNorm1d(3, affine=False)).append(nn.Linear(3, 2))
    nn.init.normal_(model[1].weight)
    graph = trace(model, torch.randn(2, 3, 2, 2))
    (gamma,) = norms_of(model, graph.group("0"))
    assert torch.equal(gamma, model[1].weight.detach().double()[:, None])
    assert all(norms_of(model, g) == [] for g in graph.groups if g.name != "0")
    score = BatchNormScale().score(GroupView("0", 5, norms=lambda: [gamma]))
    assert torch.equal(score, model[1].weight.detach().double().abs())
