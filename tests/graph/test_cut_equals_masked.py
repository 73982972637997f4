"""Cut model == masked model, for every mechanism of the zoo and several random plans each."""

import pytest
import torch
from torch.utils._pytree import tree_leaves

from actprune import trace
from actprune.core.calling import call
from actprune.pruning.plans import draft
from actprune.pruning.verify import rehearse
from actprune.surgery import cut
from masked import counted, difference, masked, outputs, random_units
from zoo import ZOO, build

PLANS = 4


@pytest.mark.parametrize("name", ZOO)
def test_cuttable_widths_are_as_derived_by_hand(name):
    model, example = build(name)
    for graph in (trace(model, example), rehearse(model, example)[0]):
        assert sorted(g.size for g in graph.unlocked) == ZOO[name].sizes, str(graph)


@pytest.mark.parametrize("name", ZOO)
def test_cut_equals_masked(name):
    for seed in range(PLANS):
        model, example = build(name, seed, torch.float64)
        graph, _ = rehearse(model, example)
        plan = draft(model, graph, random_units(graph, seed))
        references = [masked(model, plan)]
        if not ZOO[name].products:
            references.append(masked(model, plan, consumers_only=True))
        cut(model, plan, example)
        ours = outputs(model, example)
        for reference in references:
            assert difference(ours, outputs(reference, example)) < 1e-11, (seed, plan.removed)


@pytest.mark.parametrize("name", ZOO)
def test_cost_is_as_predicted_and_as_pytorch_counts(name):
    model, example = build(name)
    graph, _ = rehearse(model, example)
    assert counted(model, example) == (graph.params, graph.macs)
    plan = draft(model, graph, random_units(graph, 11))
    cut(model, plan, example)
    after = trace(model, example)
    assert counted(model, example) == (plan.params_after, plan.macs_after) == (after.params, after.macs)


@pytest.mark.parametrize("name", ZOO)
def test_a_cut_model_trains(name):
    model, example = build(name)
    graph, _ = rehearse(model, example)
    flags = {n: p.requires_grad for n, p in model.named_parameters()}
    cut(model, draft(model, graph, random_units(graph, 5)), example)
    assert {n: p.requires_grad for n, p in model.named_parameters()} == flags
    for training in (True, False):
        model.train(training)
        model.zero_grad()
        loss = sum(x.square().sum() for x in tree_leaves(call(model, example)))
        loss.backward()
        grads = [p.grad for p in model.parameters() if p.grad is not None]
        assert grads
        assert all(torch.isfinite(g).all() for g in grads)


@pytest.mark.parametrize("name", ZOO)
def test_float32_and_a_second_cut(name):
    model, example = build(name)
    for seed in (1, 2):
        graph, _ = rehearse(model, example)
        plan = draft(model, graph, random_units(graph, seed, most=2))
        reference = masked(model, plan)
        cut(model, plan, example)
        assert difference(outputs(model, example), outputs(reference, example)) < 1e-5
