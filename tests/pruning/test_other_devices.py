"""Observation where the network is, on a device other than the CPU: no waiting, the same numbers; on any machine.

And what a default device does to a network that is on the CPU: nothing.
"""

import copy
import dataclasses

import pytest
import torch

import actprune
from actprune import Budget, Pruner, criteria, trace
from actprune.capacity import measure, psi
from actprune.compensation import LeastSquares, Mean
from actprune.core import linears
from actprune.pruning import Panel, lies
from actprune.pruning.agreement import agreement
from actprune.sparsity import GroupLasso, ProxSGD, unit_groups
from foreign import network
from pretended import NAME, Device, Pretended, needs_pretending, put
from processes import apart
from zoo import build

torch.set_num_threads(1)

SETTINGS = {
    "streams": (Mean(), {
        "entropy": criteria.Entropy(), "rms": criteria.RMS(), "variance": criteria.Variance(), "zeros": criteria.ZeroRate(),
        "rademacher": criteria.Rademacher(estimate="monte_carlo"),
    }),
    "labels": (Mean(), {"labels": criteria.LabelInformation(classes=3), "states": criteria.StateEntropy()}),
    "second moments": (LeastSquares(), {"flap": criteria.FLAP(), "gram": criteria.Reconstruction()}),
}  # fmt: skip


def observed(pruner, model, batches, labels, after_first=lambda: None):
    """An observation; what it waits for after the first batch is told apart."""
    with pruner.observe() as observation, torch.no_grad():
        for number, (x, y) in enumerate(zip(batches, labels, strict=True)):
            observation.begin_batch(range(4 * number, 4 * number + len(x)), y)
            model(x)
            if not number:
                after_first()
    return observation


@needs_pretending
@apart
@pytest.mark.parametrize("positions", [3, None])
@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("name", ["ConvBn", "AttentionPacked", "CrossAttention", "Flatten"])
def test_nobody_waits_for_a_device_and_the_numbers_are_the_same(name, setting, positions, monkeypatch):
    """After the first batch, which brings states to the device, no batch has the host read anything back."""
    for module in (linears, lies):
        monkeypatch.setattr(module, "is_ordinary", lambda x: isinstance(x, torch.Tensor))  # as tensors of a real device are
    model, example = build(name)
    torch.manual_seed(0)
    batches, labels = torch.randn(14, *example.shape[1:]).split(4), (torch.arange(14) % 3).split(4)
    compensation, panel = SETTINGS[setting]
    pruner = Pruner(model.eval(), example, Panel(panel), Budget(params=0.9), compensation=compensation, positions=positions)
    on_cpu = [statistic.compute() for statistic in observed(pruner, model, batches, labels)._statistics()]
    with Device() as device:
        there = [[Pretended(x) for x in part] for part in (batches, labels)]
        statistics = observed(pruner, put(model), *there, after_first=device.waits.clear)._statistics()
        assert not device.waits, "".join(device.waits[0])
        for statistic, expected in zip(statistics, on_cpu, strict=True):
            assert statistic.device.type == NAME
            torch.testing.assert_close(statistic.compute().inside, expected, rtol=1e-5, atol=1e-6)


class Weighted(criteria.Variance):
    """A user's criterion, which makes tensors where PyTorch's default is."""

    def score(self, view):
        ((statistic,),) = view.statistics.values()
        return statistic.compute()[:, 1] * torch.arange(1, view.size + 1)


@needs_pretending
@apart
def test_what_users_write_finds_its_default_device():
    model, example = build("ConvBn")
    pruner = Pruner(model.eval(), example, Weighted(), Budget(params=0.9), compensation=None, positions=3)
    batches = torch.randn(8, *example.shape[1:]).split(4)
    on_cpu = pruner.scores(observed(pruner, model, batches, [None, None]))
    with Device():
        put(model)
        torch.set_default_device(NAME)
        there = [Pretended(x) for x in batches]
        scores = pruner.scores(observed(pruner, model, there, [None, None]))
    torch.testing.assert_close({name: scores[name] for name in on_cpu}, on_cpu, rtol=1e-5, atol=1e-6)


def both_ways(run):
    """What it says, and what it says where tensors that are made without a word about their device have no elements."""
    said = [run()]
    torch.set_default_device("meta")
    try:
        said.append(run())
    finally:
        torch.set_default_device(None)
    return said


SCORERS = [
    criteria.Entropy(), criteria.Entropy(range="unit"), criteria.StateEntropy(), criteria.Rademacher(),
    criteria.Rademacher(estimate="monte_carlo"), criteria.Variance(), criteria.HRank(), criteria.FLAP(), criteria.Wanda(),
    criteria.Reconstruction(), criteria.LabelInformation(classes=3), criteria.Taylor(), criteria.Sensitivity(),
    criteria.Magnitude(), criteria.FPGM(), criteria.Random(),
]  # fmt: skip


@pytest.mark.parametrize("compensation", [Mean(), LeastSquares()])
@pytest.mark.parametrize("criterion", SCORERS, ids=lambda criterion: repr(criterion)[:40])
def test_the_default_device_changes_nothing(criterion, compensation):
    torch.manual_seed(0)
    net, x = network().eval(), torch.randn(24, 3, 8, 8)
    pairs = list(zip(x.split(8), (torch.arange(24) % 3).split(8), strict=True))

    def pruned():
        model = copy.deepcopy(net)
        actprune.prune(model, x[:2], pairs, criterion=criterion, budget=Budget(params=0.6), compensation=compensation)
        return model(x)

    assert torch.equal(*both_ways(pruned))


@pytest.mark.parametrize("name", ["AttentionPacked", "CrossAttention", "GluChunk", "Shuffle", "Dense", "Flatten"])
def test_the_default_device_changes_nothing_of_other_kinds_of_networks(name):
    net, x = build(name)

    def pruned():
        model = copy.deepcopy(net.eval())
        actprune.prune(model, x, [x, x], criterion=criteria.Entropy(), budget=Budget(params=0.8))
        return model(x)

    assert torch.equal(*both_ways(pruned))


def test_the_default_device_changes_nothing_of_an_analysis():
    torch.manual_seed(0)
    model, x = network().eval(), torch.randn(24, 3, 8, 8)
    pairs = list(zip(x.split(8), (torch.arange(24) % 3).split(8), strict=True))
    panel = {"entropy": criteria.Entropy(), "ranks": criteria.HRank(), "l1": criteria.Magnitude()}

    def found():
        influence = actprune.analyze(model, x[:2], pairs, pairs, criteria=panel)
        return repr((dataclasses.replace(influence, seconds_before=0), agreement(influence)))

    one, other = both_ways(found)
    assert one == other


def stepped(model, x):
    optimizer = ProxSGD(model.parameters(), lr=0.05, penalty=GroupLasso(0.05), groups=unit_groups(model, trace(model, x[:2])))
    for _ in range(3):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(x), torch.arange(len(x), device="cpu") % 3).backward()
        optimizer.step()
    return model(x)


def bounded(model, x):
    return measure(model.eval(), copy.deepcopy(model), x[:2]), psi(3.0)


@pytest.mark.parametrize("run", [stepped, bounded])
def test_the_default_device_changes_nothing_of_sparsity_and_capacity(run):
    torch.manual_seed(0)
    net, x = network(), torch.randn(24, 3, 8, 8)
    one, other = both_ways(lambda: repr(run(copy.deepcopy(net), x)))
    assert one == other
