"""A run that is to leave no trace leaves none in weights, lists, dicts, arrays and objects, whoever writes to them."""

import copy
from collections import defaultdict, deque

import numpy as np
import pytest
import torch
from torch import nn

import actprune
from actprune.core.calling import evaluating, undisturbed
from processes import apart, needs_operators_of_functions


class Meter:
    def __init__(self):
        self.sum, self.rows = 0.0, []


class Writes(nn.Module):
    """Three layers, and a forward that writes to everything it holds, as ``how`` says."""

    def __init__(self, how=lambda net, y: None):
        super().__init__()
        self.zeroth, self.first, self.second, self.how = nn.Linear(4, 8), nn.Linear(8, 6), nn.Linear(6, 3), how
        self.table, self.plain = nn.Parameter(torch.rand(6, 6)), torch.ones(6)
        self.of_lists, self.of_dicts = [torch.ones(6), [1]], {"a": torch.ones(6), "b": {"c": [1]}}
        self.by_key, self.last, self.names = defaultdict(list), deque([1, 2], maxlen=2), {"one"}
        self.array, self.meter, self.others = np.ones(3), Meter(), [nn.Linear(6, 6)]

    def forward(self, x):
        y = self.first(self.zeroth(x).relu()).relu()
        with torch.no_grad():
            self.how(self, y)
        return self.second(y * self.plain * self.of_lists[0] * self.of_dicts["a"] + (y @ self.table))


def state(net):
    held = (
        net.state_dict(),
        net.plain,
        net.of_lists,
        net.of_dicts,
        net.by_key,
        net.last,
        net.names,
        net.array,
        vars(net.meter),
    )
    return copy.deepcopy((*held, net.others[0].state_dict()))


def equal(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, np.ndarray):
        return np.array_equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    return (len(a) == len(b) and all(map(equal, a, b))) if isinstance(a, (list, tuple, deque)) else a == b


WAYS = {
    "in place": lambda net, y: net.table.mul_(2),
    "data in place": lambda net, y: net.table.data.mul_(2),
    "a view": lambda net, y: net.table[1:, 2].fill_(3),
    "out": lambda net, y: torch.mul(net.table.data, 2, out=net.table.data),
    "other data": lambda net, y: setattr(net.table, "data", net.table.data * 2),
    "data written to, then other data": lambda net, y: (net.table.mul_(2), setattr(net.table, "data", torch.rand(6, 6))),
    "another parameter": lambda net, y: setattr(net, "table", nn.Parameter(net.table * 2)),
    "many at once": lambda net, y: torch._foreach_add_([net.table.data, net.plain], 1.0),
    "a plain tensor": lambda net, y: net.plain.add_(1),
    "a tensor in a list": lambda net, y: net.of_lists[0].add_(1),
    "a list": lambda net, y: (net.of_lists.append(1), net.of_lists[1].append(2)),
    "a dict": lambda net, y: (net.of_dicts.update(a=y.mean(0), d=1), net.of_dicts["b"]["c"].append(2)),
    "a dict of lists": lambda net, y: net.by_key["new"].append(1),
    "a deque": lambda net, y: net.last.append(3),
    "a set": lambda net, y: net.names.add("two"),
    "an array": lambda net, y: np.add(net.array, 1, out=net.array),
    "an object": lambda net, y: (setattr(net.meter, "sum", net.meter.sum + 1), net.meter.rows.append(1)),
    "a layer that is not registered": lambda net, y: net.others[0].weight.mul_(2),
}


@pytest.mark.parametrize("way", WAYS)
def test_nothing_of_a_run_stays(way):
    torch.manual_seed(0)
    net, x = Writes(WAYS[way]), torch.rand(2, 4)
    held, parameters = state(net), dict(net.named_parameters())
    probe = copy.deepcopy(net)
    probe(x)
    assert not equal(state(probe), held)  # it does write
    with undisturbed(net):
        net(x)
    assert equal(state(net), held)
    actprune.Pruner(net, x, actprune.criteria.Random(), actprune.Budget(params=0.9), compensation=None)
    assert equal(state(net), held)
    assert all(parameter is parameters[name] for name, parameter in net.named_parameters())


def test_only_what_is_written_to_is_copied():
    net = nn.Sequential(nn.Linear(256, 256), nn.Linear(256, 256))
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile, undisturbed(net):
        net(torch.rand(1, 256))
    assert not any(event.key == "aten::clone" for event in profile.key_averages())


def test_batch_norms_that_a_list_holds_as_well():
    class Listed(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.last = nn.BatchNorm1d(4), nn.Linear(4, 2)
            self.all = [self.norm]

        def forward(self, x):
            return self.last(self.norm(x))

    net, x = Listed(), torch.rand(8, 4)
    before = copy.deepcopy(net.state_dict())
    with undisturbed(net):
        net.train()
        net(x)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


class Settings(dict):
    """A dict with attributes, as people write."""

    __getattr__ = dict.__getitem__


class Rows(list):
    pass


class Table(np.ndarray):
    pass


def test_containers_of_ones_own_classes_are_left_alone():
    net = nn.Linear(2, 2)
    net.settings, net.rows, net.table, net.kind = Settings(width=3), Rows([1]), np.ones(2).view(Table), Meter
    with undisturbed(net):
        net(torch.rand(1, 2))
    assert (net.settings, net.rows, net.table.tolist(), net.kind) == ({"width": 3}, [1], [1, 1], Meter)


def test_views_that_repeat_what_is_written_to():
    net, base = nn.Linear(2, 2), torch.ones(1)
    net.mask = base.expand(2)

    def write(module, args):
        base.mul_(3)

    net.register_forward_pre_hook(write)
    with undisturbed(net):
        net(torch.rand(1, 2))
    assert net.mask.tolist() == [1, 1]


@needs_operators_of_functions
@apart
def test_operators_of_functions_run_inside():
    net = nn.Linear(2, 2)
    with undisturbed(net):
        y = torch.cond(torch.tensor(True), lambda x: x + 1, lambda x: x - 1, (torch.ones(1, 2),))
    assert y.shape == (1, 2)


class Adapted(nn.Linear):
    """Low-rank adaptation that is merged into the weight in evaluation mode, as in the authors' package."""

    def __init__(self, *sizes):
        super().__init__(*sizes)
        self.down, self.up = nn.Parameter(torch.rand(2, sizes[0])), nn.Parameter(torch.rand(sizes[1], 2))
        self.merged = False

    def train(self, mode=True):
        super().train(mode)
        if mode == self.merged:
            self.weight.data += (-1 if mode else 1) * (self.up @ self.down)
            self.merged = not mode
        return self

    def forward(self, x):
        y = super().forward(x)
        return y if self.merged else y + x @ self.down.t() @ self.up.t()


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("what", ["undisturbed", "evaluating", "Pruner"])
def test_adapters_that_evaluation_merges(training, what):
    torch.manual_seed(0)
    net, x = nn.Sequential(Adapted(4, 6), nn.ReLU(), Adapted(6, 3)).train(training), torch.rand(5, 4)
    before, expected = copy.deepcopy(net.state_dict()), net(x)
    if what == "Pruner":
        actprune.Pruner(net, x, actprune.criteria.Random(), actprune.Budget(params=0.6), compensation=None)
    else:
        with (undisturbed if what == "undisturbed" else evaluating)(net):
            assert torch.allclose(net(x), expected, atol=1e-5)
    assert [net[0].training, net[2].training, net[0].merged] == [training, training, not training]
    assert torch.allclose(net(x), expected, atol=1e-5)
    for name, value in net.state_dict().items():
        assert torch.allclose(value, before[name], atol=0 if what != "evaluating" else 1e-6), name
