"""Parts of a model that copy others: cut by the same plan, neither counted nor observed."""

import copy

import pytest
import torch
from torch import nn

from actprune.core.budget import Budget
from actprune.core.errors import ConfigError
from actprune.criteria import Magnitude
from actprune.graph import Trace
from actprune.pruning import Pruner
from foreign import network


def n_params(module):
    return sum(p.numel() for p in module.parameters())


class Pair(nn.Module):
    """A network and a copy of it with values of its own; the copy may run first."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.copy, self.net = network(), network()

    def forward(self, x):
        slow = self.copy(x)
        return self.net(x), slow


def test_the_copy_computes_what_it_did_without_the_units_that_left():
    model, x = Pair().eval(), torch.randn(5, 3, 8, 8)
    masked = copy.deepcopy(model)
    pruner = Pruner(model, x, Magnitude(), Budget(params=0.5), compensation=None, copies={"copy": "net"})
    assert pruner.params_before == n_params(model.net)
    alone = Pruner(copy.deepcopy(model.net), x, Magnitude(), Budget(params=0.5), compensation=None)
    assert (pruner.params, pruner.macs, pruner.units) == (alone.params, alone.macs, alone.units)
    plan = pruner.plan(None)
    expected = {name: dims for name, dims in alone.plan(None).removed.items()}
    assert plan.removed == {f"{of}.{name}": dims for of in ("net", "copy") for name, dims in expected.items()}
    assert (plan.params_after, plan.macs_after) == (alone.plan(None).params_after, alone.plan(None).macs_after)
    for part in (masked.net, masked.copy):
        tensors = {**dict(part.named_parameters()), **dict(part.named_buffers())}
        for name, dims in expected.items():
            for dim, gone in dims.items():
                tensors[name].data.index_fill_(dim, torch.tensor(gone), 0)
    pruner.execute(plan)
    assert pruner.params == n_params(model.net) == n_params(model.copy) < n_params(masked.net)
    with torch.no_grad():
        for after, before in zip(model(x), masked(x), strict=True):
            torch.testing.assert_close(after, before)


def test_shared_tensors_are_cut_once():
    class Sharing(Pair):
        def __init__(self):
            super().__init__()
            self.copy[0].weight = self.net[0].weight

    model, x = Sharing().eval(), torch.randn(2, 3, 8, 8)
    pruner = Pruner(model, x, Magnitude(), Budget(params=0.5), compensation=None, copies={"copy": "net"})
    assert pruner.params_before == n_params(model.net)
    pruner.execute(pruner.plan(None))
    assert model.copy[0].weight is model.net[0].weight
    assert pruner.params == n_params(model.net) == n_params(model.copy)


class Tied(nn.Module):
    """Reads and writes words with one table."""

    def __init__(self):
        super().__init__()
        self.read, self.write = nn.Embedding(11, 24), nn.Linear(24, 11, bias=False)
        self.inside = nn.Sequential(nn.Linear(24, 40), nn.GELU(), nn.Linear(40, 24))
        self.write.weight = self.read.weight

    def forward(self, words):
        return self.write(self.inside(self.read(words)))


def test_tied_tensors_of_a_copy_stay_tied():
    class Twice(Pair):
        def __init__(self):
            super().__init__()
            self.net = Tied()
            self.copy = copy.deepcopy(self.net)

    model, words = Twice(), torch.arange(10).reshape(2, 5)
    pruner = Pruner(model, words, Magnitude(), Budget(params=0.6), compensation=None, copies={"copy": "net"})
    pruner.execute(pruner.plan(None))
    assert model.copy.read.weight is model.copy.write.weight
    one, other = model(words)
    assert torch.equal(one, other)
    assert pruner.params == n_params(model.net) == n_params(model.copy) <= 0.6 * pruner.params_before


def test_nothing_of_a_copy_is_in_the_graph():
    graph = Trace(Pair(), torch.randn(2, 3, 8, 8), copies={"copy": "net"}).graph()
    assert not any(name.startswith("copy") for name, _ in graph.columns)
    assert {consumer.module.partition(".")[0] for consumer in graph.consumers} == {"net"}
    assert {site.module.partition(".")[0] for group in graph.groups for site in group.sites} == {"net"}


def test_a_copy_that_is_not_there_is_refused():
    with pytest.raises(ConfigError, match="copies names 'slow', which is no part of Pair"):
        Pruner(Pair(), torch.randn(2, 3, 8, 8), Magnitude(), Budget(params=0.5), copies={"slow": "net"})
