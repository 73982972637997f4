"""A budget of parameters holds with the biases that compensation gives to layers without one."""

import logging

import pytest
import torch
from torch import nn

from actprune import Budget, Pruner, criteria
from actprune.compensation import LeastSquares, Mean
from actprune.core.calling import call
from actprune.pruning.biases import biases_given
from actprune.pruning.plans import draft
from zoo import ZOO, build

torch.set_num_threads(1)


def network(widths=(20, 32, 24, 16, 4)):
    torch.manual_seed(0)
    layers = [part for a, b in zip(widths, widths[1:], strict=False) for part in (nn.Linear(a, b, bias=False), nn.ReLU())]
    return nn.Sequential(*layers[:-1])


def observed(pruner, x):
    with pruner.observe() as observation, torch.no_grad():
        observation.begin_batch(range(2))
        call(pruner.model, x)
    return observation


@pytest.mark.parametrize("compensation", [Mean(), LeastSquares()])
@pytest.mark.parametrize("kept", [0.9, 0.7, 0.5, 0.3])
def test_the_budget_holds_with_them(kept, compensation):
    model, x = network(), torch.randn(2, 20)
    pruner = Pruner(model, x, criteria.RMS(), Budget(params=kept), compensation=compensation)
    for due in (0.4, 0.8, 1.0):
        plan = pruner.plan(observed(pruner, x), due)
        if plan is not None:
            pruner.execute(plan)
        assert pruner.params <= pruner.target(due)
    assert pruner.params == sum(p.numel() for p in model.parameters())
    assert any(name.endswith("bias") for name, _ in model.named_parameters())
    largest = max(sum(model[k].weight.shape) + 1 for k in (0, 2, 4, 6))
    assert pruner.params > pruner.target(1.0) - 4 * largest  # and hardly more has left than had to


@pytest.mark.parametrize("name", ZOO)
def test_as_many_are_foreseen_as_are_given(name):
    model, x = build(name)
    pruner = Pruner(model.eval(), x, criteria.Random(), Budget(units=0.99), compensation=Mean())
    observation = observed(pruner, x)
    units = {group.name: [0] for group in pruner.graph.unlocked if group.size > 1}
    foreseen = biases_given(model, pruner.graph, pruner.graph.removed(units), observation.folds)
    plain = draft(model, pruner.graph, units)
    before = {name for name, _ in model.named_parameters()}
    pruner._units = lambda *_: units
    pruner.execute(pruner.plan(observation))
    given = {name: p for name, p in model.named_parameters() if name not in before}
    assert sum(p.numel() for p in given.values()) == foreseen
    assert pruner.params == plain.params_after + foreseen


def test_what_cannot_be_kept_is_said(caplog):
    model, x = network((6, 8, 3)), torch.randn(2, 6)
    pruner = Pruner(model, x, criteria.RMS(), Budget(params=9 / 72), compensation=Mean())  # one unit of eight: nothing less
    with caplog.at_level(logging.WARNING):
        pruner.execute(pruner.plan(observed(pruner, x)))
    assert pruner.params == 9 + 3
    assert "biases of 3 parameters, 3 of them beyond the budget" in caplog.text
