"""A module that runs other products in one call than in the next: each of them is told apart, as if two modules ran them."""

import copy
import logging

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from actprune import Budget, Pruner, criteria
from actprune.compensation import Mean
from actprune.core.operands import InCall
from actprune.pruning import Panel
from actprune.pruning.replacement import Replacement

torch.set_num_threads(1)


class Attends(nn.Module):
    """Self-attention, then cross-attention of as many tokens, with one module, or with a copy for the second call."""

    def __init__(self):
        super().__init__()
        self.embed, self.memory, self.head = nn.Linear(8, 12), nn.Linear(8, 12), nn.Linear(12, 4)
        self.first = nn.MultiheadAttention(12, 3, batch_first=True)
        self.second = self.first

    def forward(self, x):
        y, m = self.embed(x), self.memory(x.flip(1))
        y = y + self.first(y, y, y, need_weights=False)[0]
        return self.head(y + self.second(y, m, m, need_weights=False)[0])


class Layer(nn.Module):
    """Weights of its own; ``deep`` calls run one product more."""

    def __init__(self):
        super().__init__()
        self.one, self.two = (nn.Parameter(torch.randn(6, 6)) for _ in range(2))

    def forward(self, x, deep):
        return torch.tanh((torch.tanh(x @ self.two) if deep else x) @ self.one)


class Deepens(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Linear(8, 6), nn.Linear(6, 4)
        self.first = Layer()
        self.second = self.first

    def forward(self, x):
        return self.head(self.second(self.first(self.embed(x), False), True))


class Slices(nn.Module):
    """Multiplies by the part of its weight that is asked for."""

    def __init__(self):
        super().__init__()
        self.weight, self.n = nn.Parameter(torch.randn(5, 12)), 6

    def forward(self, x, second):
        return F.linear(x, self.weight[:, self.n :] if second else self.weight[:, : self.n])


class Parts(nn.Module):
    """Calls that look alike and read other units."""

    def __init__(self):
        super().__init__()
        self.embed, self.memory, self.head = nn.Linear(8, 6), nn.Linear(8, 6), nn.Linear(5, 4)
        self.first = Slices()
        self.second = self.first

    def forward(self, x):
        y, m = torch.relu(self.embed(x)), 10 * torch.relu(self.memory(x))
        return self.head(torch.tanh(self.first(y, False) + self.second(m, True)))


class Product(nn.Module):
    def forward(self, x, weight):
        return x @ weight


class Computed(Parts):
    """Weights that the caller makes."""

    def __init__(self):
        super().__init__()
        self.one, self.two = (nn.Parameter(torch.randn(6, 5)) for _ in range(2))
        self.first = Product()
        self.second = self.first

    def forward(self, x):
        y, m = torch.relu(self.embed(x)), 10 * torch.relu(self.memory(x))
        return self.head(torch.tanh(self.first(y, self.one.tanh()) + self.second(m, self.two.tanh())))


def apart(model):
    """The same network with a module for each call."""
    other = copy.deepcopy(model)
    other.second = copy.deepcopy(other.first)
    return other


PANEL = {"rms": criteria.RMS(), "zeros": criteria.ZeroRate(), "taylor": criteria.Taylor()}


def seen(model, batches):
    """What criteria and compensation saw: (module, ordinal, operand, statistic) -> its value."""
    pruner = Pruner(model, batches[0], Panel(PANEL), Budget(params=0.95), compensation=Mean(), positions=None)
    with pruner.observe() as observation, torch.no_grad():
        for number, x in enumerate(batches):
            observation.begin_batch(range(len(x) * number, len(x) * (number + 1)))
            model(x)
            observation.differentiate(loss=lambda x=x: model(x).square().sum())
    found = {}
    for group in pruner.graph.unlocked:
        for key, statistics in observation.scores[group.name].items():
            for site, statistic in zip(group.sites, statistics, strict=True):
                found[site.module, site.ordinal, site.operand, key] = statistic.compute()
    for number, (_, statistic) in observation.folds.items():
        consumer = pruner.graph.consumers[number]
        found[consumer.module, consumer.ordinal, consumer.operand, "fold"] = statistic.compute()
    return found


@pytest.mark.parametrize(("net", "places"), [(Attends, 18), (Deepens, 12), (Parts, 6), (Computed, 6)])
def test_every_call_is_seen_for_itself(net, places):
    torch.manual_seed(0)
    model, batches = net().eval(), torch.randn(12, 5, 8).split(4)
    expected, compared = seen(apart(model), batches), 0
    for (_, which, operand, key), value in seen(model, batches).items():
        if isinstance(which, InCall):
            assert which.n_calls == 2
            there = expected[("first", "second")[which.call], which.number, operand, key]
            torch.testing.assert_close(value, there, rtol=1e-5, atol=1e-7)
            compared += 1
    assert compared == places  # times statistics, with those of compensation


def fail(*_):
    raise ValueError("between the calls")


@pytest.mark.parametrize("how", ["called", "forward", "broken off"])
def test_calls_are_counted_from_the_forward_on(how):
    """Also where hooks are not told that one begins, and after one that was broken off."""
    torch.manual_seed(0)
    model, batches = Deepens(), torch.randn(12, 5, 8).split(4)
    pruner = Pruner(model, batches[0], criteria.RMS(), Budget(params=0.95), positions=None)
    with pruner.observe() as observation, torch.no_grad():
        for number, x in enumerate(batches):
            if how == "broken off" and number:
                observation.begin_batch(torch.full((4,), -1))
                handle = model.first.register_forward_hook(fail)
                with pytest.raises(ValueError, match="between the calls"):
                    model(x)
                handle.remove()
            observation.begin_batch(range(4 * number, 4 * number + 4))
            (model.forward if how == "forward" else model)(x)
    with torch.no_grad():
        x = model.embed(torch.cat(batches))
        once = torch.tanh(x @ model.first.one)
        twice = torch.tanh(once @ model.first.two)
    expected = {InCall(0, 0, 2): x, InCall(0, 1, 2): once, InCall(1, 1, 2): twice, None: torch.tanh(twice @ model.first.one)}
    compared = set()
    for group in pruner.graph.unlocked:
        for site, statistic in zip(group.sites, *observation.scores[group.name].values(), strict=True):
            read = expected[site.ordinal].double().flatten(0, 1)
            moments = torch.stack([read.mean(0), read.var(0, correction=0)], 1)
            torch.testing.assert_close(statistic.compute(), moments, rtol=1e-5, atol=1e-7)
            compared.add(site.ordinal)
    assert compared == set(expected)


def test_each_call_is_given_its_own_means():
    """A unit at its mean, where one call reads it and where the other does: as in the network with a module for each."""
    torch.manual_seed(0)
    said = []
    model, x = Deepens(), torch.randn(12, 5, 8)
    for net in (model, apart(model)):
        pruner = Pruner(net, x, criteria.Magnitude(), Budget(params=0.95), compensation=None)
        replacement = Replacement(net, pruner.graph)
        with replacement.observing(), torch.no_grad():
            net(x)
        with replacement.replacing(), torch.no_grad():
            replacement.choose({group.name: range(group.size) for group in pruner.graph.unlocked if group.name != "head"})
            said.append(net(x))
    torch.testing.assert_close(*said)
    assert said[0].std((0, 1)).max() < 1e-6  # of every input the same, for nothing else is read


def test_such_a_network_is_pruned_in_steps():
    torch.manual_seed(0)
    model, x = Attends().eval(), torch.randn(24, 5, 8)
    pruner = Pruner(model, x[:2], criteria.Entropy(), Budget(params=0.5), compensation=Mean())
    for due in (0.5, 1.0):
        with pruner.observe() as observation, torch.no_grad():
            observation.begin_batch(range(24))
            model(x)
        pruner.execute(pruner.plan(observation, due))
    assert pruner.params <= 0.5 * pruner.params_before
    assert model(x).isfinite().all()


class Gated(nn.Module):
    """Runs nothing unless it is told to."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(6, 6))

    def forward(self, x, on):
        return torch.tanh(F.linear(x, self.weight)) if on else x


class Loops(nn.Module):
    """An encoder and a decoder, which calls one module as often as it is told to."""

    def __init__(self, calls):
        super().__init__()
        self.embed, self.head, self.gate = nn.Linear(8, 6), nn.Linear(6, 4), Gated()
        self.calls = calls

    def encode(self, x):
        return self.gate(self.embed(x), False)

    def decode(self, y):
        for on in self.calls:
            y = self.gate(y, on)
        return self.head(y)

    def forward(self, x):
        return self.decode(self.encode(x))


def gate_reads(model, batches, run):
    """Mean and variance of what the gate read, and what was logged."""
    pruner = Pruner(model, batches[0], criteria.Variance(), Budget(params=0.95), positions=None, compensation=None)
    with pruner.observe() as observation, torch.no_grad():
        for number, x in enumerate(batches):
            observation.begin_batch(range(4 * number, 4 * number + 4))
            run(model, x, observation)
    return [
        statistic.compute()
        for group in pruner.graph.unlocked
        for site, statistic in zip(group.sites, *observation.scores[group.name].values(), strict=True)
        if site.module == "gate"
    ]


def lone_call(model, x, observation):
    with observation.paused():
        model.encode(x)
    model.decode(model.encode(x))
    model.encode(x)


@pytest.mark.parametrize("calls", [(True,), (True, False), (False, True, False)])
@pytest.mark.parametrize(
    "run", [lambda model, x, _: model(x), lambda model, x, _: model.forward(x), lone_call], ids=["called", "forward", "lone"]
)
def test_calls_that_run_nothing_count(calls, run, caplog):
    torch.manual_seed(0)
    model, batches = Loops(calls), torch.randn(12, 5, 8).split(4)
    with caplog.at_level(logging.WARNING):
        (found,) = gate_reads(model, batches, run)
    with torch.no_grad():
        read = model.embed(torch.cat(batches)).double().flatten(0, 1)
    torch.testing.assert_close(found, torch.stack([read.mean(0), read.var(0, correction=0)], 1), rtol=1e-5, atol=1e-7)
    lone = "gate runs more often than the" in caplog.text  # the last encode() of a batch is one call more
    assert lone == (run is lone_call)
    assert "other weights" not in caplog.text


def test_calls_beyond_those_of_the_trace_are_not_taken_for_them(caplog):
    torch.manual_seed(0)
    model, batches = Loops((True, False)), torch.randn(12, 5, 8).split(4)

    def longer(model, x, _):
        model.calls = (True, False, True, True, True)
        model(x)
        model.calls = (True, False)

    with caplog.at_level(logging.WARNING):
        (found,) = gate_reads(model, batches, longer)
    with torch.no_grad():
        read = model.embed(torch.cat(batches)).double().flatten(0, 1)
    torch.testing.assert_close(found, torch.stack([read.mean(0), read.var(0, correction=0)], 1), rtol=1e-5, atol=1e-7)
    assert caplog.text.count("gate runs more often than the 3 times that the trace saw") == 1
