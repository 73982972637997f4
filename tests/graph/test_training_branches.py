"""Branches that run in training mode only: cut with the rest, neither counted nor observed."""

import pytest
import torch
from torch import nn

import actprune
from actprune import trace
from actprune.pruning.plans import draft
from actprune.pruning.verify import Repairs, rehearse, traced
from actprune.surgery import cut
from masked import counted, masked, random_units


class Auxiliary(nn.Module):
    """A classifier on the side that helps to train; ``least``: how many samples its batch norm insists on."""

    def __init__(self):
        super().__init__()
        self.stem, self.body = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 7, 3)
        self.side, self.norm = nn.Conv2d(6, 5, 1), nn.BatchNorm1d(5)
        self.aux, self.head = nn.Linear(5, 4), nn.Linear(7, 4)

    def forward(self, x):
        x = self.stem(x).relu()
        y = self.head(self.body(x).relu().mean((2, 3)))
        if not self.training:
            return y
        return y, self.aux(self.norm(self.side(x).mean((2, 3))).relu())


@pytest.mark.parametrize("samples", [1, 3])  # batch norm over one sample of one position fails: the trace takes two
def test_both_modes_equal_the_masked_network(samples):
    torch.manual_seed(0)
    model, x = Auxiliary().double(), torch.randn(samples, 3, 9, 9, dtype=torch.float64)
    graph = trace(model, x)
    assert sorted(g.size for g in graph.unlocked) == [5, 6, 7]
    assert counted(model, x)[1] == graph.macs
    plan = draft(model, graph, random_units(graph, 3))
    assert any(name.startswith("side") for name in plan.removed)
    reference = masked(model, plan)
    cut(model, plan, x)
    assert counted(model, x) == (plan.params_after, plan.macs_after)
    many = torch.randn(4, 3, 9, 9, dtype=torch.float64)
    for training in (False, True):
        ours, theirs = model.train(training)(many), reference.train(training)(many)
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)


def test_the_trace_in_training_mode_leaves_no_trace():
    model = Auxiliary().eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    torch.manual_seed(5)
    trace(model, torch.randn(2, 3, 9, 9))
    drawn = torch.rand(1)
    torch.manual_seed(5)
    torch.randn(2, 3, 9, 9)
    assert torch.equal(drawn, torch.rand(1))
    assert not model.training
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_activations_cannot_score_what_is_not_run_in_validation():
    model, x = Auxiliary().eval(), torch.randn(8, 3, 9, 9)
    pruner = actprune.Pruner(model, x, actprune.criteria.Entropy(), actprune.Budget(params=0.8))
    group = pruner.graph.group("side")
    assert "evaluation mode" in group.locked
    actprune.prune(model, x, [x], criterion=actprune.criteria.Entropy(), budget=actprune.Budget(params=0.8))
    model.train()(x)


class NeedsTargets(Auxiliary):
    def forward(self, x, targets=None):
        if self.training and targets is None:
            raise ValueError("targets are needed to train")
        return self.head(self.body(self.stem(x).relu()).relu().mean((2, 3)))


def test_a_model_that_cannot_run_in_training_mode_is_traced_as_far_as_it_runs():
    model, x = NeedsTargets(), torch.randn(2, 3, 9, 9)
    graph = trace(model, x)
    assert sorted(g.size for g in graph.unlocked) == [6, 7]
    assert graph.params == sum(p.numel() for p in model.parameters())


class OnlyWhileTraining(nn.Module):
    """Two streams that meet in training mode only, and noise of a width that the module keeps."""

    def __init__(self):
        super().__init__()
        self.width = 8
        self.one, self.two = nn.Linear(5, 8), nn.Linear(5, 8)
        self.norm, self.first, self.second = nn.BatchNorm1d(8), nn.Linear(8, 3), nn.Linear(8, 3)

    def forward(self, x):
        a, b = self.norm(self.one(x)), self.two(x).relu()
        if self.training:
            return self.first(a + b * (1 + 0 * torch.randn(self.width))) - self.second(b)
        return self.first(a) - self.second(b)


@pytest.mark.parametrize("samples", [1, 4])
def test_what_only_training_mode_ties_leaves_together(samples):
    torch.manual_seed(0)
    model, x = OnlyWhileTraining().double(), torch.randn(samples, 5, dtype=torch.float64)
    assert len(trace(model, x).unlocked) == 2
    graph, repairs = rehearse(model, x)
    assert repairs.training
    assert Repairs.from_dict(repairs.to_dict()) == repairs
    assert len(graph.unlocked) == len(traced(model, x, repairs).unlocked) == 1
    plan = draft(model, graph, random_units(graph, 1))
    reference = masked(model, plan)
    cut(model, plan, x)
    many = torch.randn(6, 5, dtype=torch.float64)
    for training in (False, True):
        ours, theirs = model.train(training)(many), reference.train(training)(many)
        torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-11)


def test_a_model_that_cannot_train_on_its_example_is_left_at_that():
    class NeedsTargets(OnlyWhileTraining):
        def forward(self, x, target=None):
            if self.training and target is None:
                raise ValueError("pass a target")
            return super().forward(x)

    assert not rehearse(NeedsTargets(), torch.randn(3, 5))[1].training
