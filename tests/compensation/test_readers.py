"""Readers that are no plain layer of their own: attention's projections, layers without a place for a shift, grouped ones."""

import logging

import pytest
import torch
from torch import nn

import actprune
from actprune import Budget, Pruner, criteria
from actprune.compensation import LeastSquares
from actprune.core.views import Criterion
from actprune.pruning.batches import observe_pairs, pairs_of
from actprune.pruning.plans import compensated, draft
from zoo import ZOO, build

EXACT = LeastSquares(ridge=1e-10, positions=10**6, refit="once", recalibrate=False)


class First(Criterion):
    def score(self, view):
        return torch.arange(view.size, dtype=torch.float64)


def cut_first(model, x, n, name, how=EXACT):
    """Remove the first n units of the group of that name and fold."""
    model.eval()
    pruner = Pruner(model, x[:1], First(), Budget(params=0.999), compensation=how)
    observation = observe_pairs(pruner, pairs_of([x], x[:1]))
    units = {name: list(range(n))}
    plan = compensated(draft(model, pruner.graph, units), model, pruner.graph, units, observation, how)
    pruner.execute(plan)
    return plan


class Attending(nn.Module):
    """``nn.MultiheadAttention`` that reads a stream of eight channels."""

    def __init__(self, bias=True):
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Linear(5, 8)
        self.attention = nn.MultiheadAttention(8, 4, batch_first=True, bias=bias)
        self.end = nn.Linear(8, 3)

    def forward(self, x):
        x = self.stem(x).sin()
        return self.end(self.attention(x, x, x, need_weights=False)[0])


@pytest.mark.parametrize("bias", [True, False])
def test_a_head_that_repeats_another_leaves_through_the_output_projection(bias):
    model, x = Attending(bias), torch.randn(60, 6, 5)
    with torch.no_grad():
        for part in range(3):  # queries, keys and values of head 0 are those of head 1
            rows = 8 * part + torch.arange(2)
            model.attention.in_proj_weight[rows] = model.attention.in_proj_weight[rows + 2]
            if bias:
                model.attention.in_proj_bias[rows] = model.attention.in_proj_bias[rows + 2]
    before = model.eval()(x).detach()
    heads = next(g.name for g in actprune.trace(model, x[:1]).unlocked if g.size == 4)
    plan = cut_first(model, x, 1, heads)
    assert "attention.out_proj.weight" in plan.shifts
    torch.testing.assert_close(model(x), before, rtol=1e-4, atol=1e-5)


def test_stream_channels_that_repeat_others_leave_through_the_input_projections():
    model, x = Attending(), torch.randn(60, 6, 5)
    with torch.no_grad():
        model.stem.weight[:2], model.stem.bias[:2] = model.stem.weight[2:4], model.stem.bias[2:4]
    before = model.eval()(x).detach()
    stream = next(g for g in actprune.trace(model, x[:1]).unlocked if ("stem.weight", 0) in g.members)
    plan = cut_first(model, x, 2, stream.name)
    assert "attention.in_proj_weight" in plan.shifts
    torch.testing.assert_close(model(x), before, rtol=1e-4, atol=1e-5)


def test_weights_that_are_not_refitted_are_named(caplog):
    model, x = Attending(), torch.randn(60, 6, 5)
    with caplog.at_level(logging.WARNING):
        actprune.prune(model, x[:1], [x], criterion=criteria.Variance(), budget=Budget(params=0.7), compensation=LeastSquares())
    assert (
        "1 weights keep what was folded into them once, their layers cannot be refitted: attention.out_proj.weight"
        in caplog.text
    )


def test_what_no_weight_of_its_own_reads_is_named(caplog):
    """A pruned attention takes its packed projection apart, so that a second step has nothing there to fold into."""
    model, x = Attending(), torch.randn(60, 6, 5)
    heads = next(g.name for g in actprune.trace(model, x[:1]).unlocked if g.size == 4)
    cut_first(model, x, 1, heads)
    assert "without a weight of its own" not in caplog.text
    with caplog.at_level(logging.WARNING):
        Pruner(model, x[:1], First(), Budget(params=0.9), compensation=LeastSquares()).observation()
    assert "nothing is folded where units are read without a weight of its own: attention" in caplog.text


def test_a_new_bias_enters_optimizer_and_record_and_is_refitted():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 20), nn.Sigmoid(), nn.Linear(20, 9, bias=False), nn.Sigmoid(), nn.Linear(9, 2))
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    x = torch.randn(300, 6)
    model(x).square().sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    options = {"criterion": First(), "budget": Budget(params=0.6), "compensation": LeastSquares()}
    record = actprune.prune(model, x[:1], [x], optimizers=[optimizer], **options)
    bias = model[2].bias
    assert record.biases == ["2"]
    assert any(p is bias for group in optimizer.param_groups for p in group["params"])
    assert record.steps[-1]["params_after"] == sum(p.numel() for p in model.parameters())
    before = bias.detach().clone()
    model(x).square().sum().backward()
    optimizer.step()
    assert not torch.equal(bias, before)


@pytest.mark.parametrize("name", ["Grouped", "GroupedThenGrouped", "DepthMultiplier"])
def test_nothing_is_folded_into_grouped_convolutions_for_whole_groups_leave(name):
    model, example = build(name)
    torch.manual_seed(1)
    data = [ZOO[name].example() for _ in range(3)]
    grouped = {f"{path}.weight" for path, m in model.named_modules() if isinstance(m, nn.Conv2d) and m.groups > 1}
    pruner = Pruner(model.eval(), example, criteria.Variance(), Budget(params=0.7), compensation=LeastSquares())
    plan = pruner.plan(observe_pairs(pruner, pairs_of(data, example)))
    assert grouped
    assert not grouped & set(plan.shifts)
