"""Random networks, random plans: cut == masked, params and MACs as predicted, and as PyTorch counts them."""

import pytest
import torch

from actprune import trace
from actprune.pruning.plans import draft
from actprune.surgery import cut
from graph.fuzz import Net
from masked import counted, difference, masked, outputs, random_units
from zoo import scatter_

EVERY_TEST = 50
SLOW = 500


def check(seed):
    model = Net(seed).double()
    scatter_(model)
    example = torch.randn(2, 3, 6, 6, dtype=torch.float64)
    graph = trace(model, example)
    assert (graph.params, graph.macs) == counted(model, example)
    plan = draft(model, graph, random_units(graph, seed))
    reference = outputs(masked(model, plan), example)
    cut(model, plan, example)
    assert difference(outputs(model, example), reference) < 1e-8, f"{model}\n{graph}\n{plan.removed}"
    after = trace(model, example)
    assert (plan.params_after, plan.macs_after) == counted(model, example) == (after.params, after.macs)
    return len(graph.unlocked)


@pytest.mark.parametrize("seed", range(EVERY_TEST))
def test_random_network(seed):
    assert check(seed) > 0


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(EVERY_TEST, EVERY_TEST + SLOW))
def test_many_random_networks(seed):
    assert check(seed) > 0
