"""Post-training pruning as one call: what it measures, and that every net of the zoo goes through it."""

import copy

import pytest
import torch
from torch import nn

import actprune
from actprune import Budget, Selection, criteria
from actprune.compensation import LeastSquares, Mean
from actprune.core.errors import ObservationError
from actprune.pruning import prune_trained
from zoo import ZOO, build


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 40), nn.ReLU(), nn.Linear(40, 30), nn.ReLU(), nn.Linear(30, 3))


def test_scores_sizes_seconds_and_latency_are_reported():
    model, x = network(), torch.randn(300, 8)
    target = network()(x).detach()
    seen = []

    def evaluate(net):
        assert not net.training
        assert not torch.is_grad_enabled()
        seen.append(net[0].out_features)
        return -(net(x) - target).square().mean().item()

    done = prune_trained(
        model, x[:1], x.split(100), criterion=criteria.Reconstruction(), budget=Budget(macs=0.5), evaluate=evaluate
    )
    assert done.score_before == 0
    assert done.score_cut < done.score_after < 0
    assert len(seen) == 3
    assert seen[0] == 40
    assert seen[1] == seen[2] == model[0].out_features < 40
    assert done.macs[0] == 8 * 40 + 40 * 30 + 30 * 3
    assert done.macs[1] == actprune.trace(model, x[:1]).macs <= done.macs[0] / 2
    assert done.params[1] == sum(p.numel() for p in model.parameters())
    assert done.record.widths == model._surgery_record.widths
    assert done.seconds > 0
    assert set(done.latency) == {1, 64}
    assert all(before > 0 and after > 0 for before, after in done.latency.values())
    assert model.training


def test_it_is_what_prune_does():
    x = torch.randn(200, 8)
    options = {"criterion": criteria.Variance(), "budget": Budget(params=0.5), "compensation": LeastSquares()}
    first, second = network(), network()
    prune_trained(first, x[:1], [x], evaluate=lambda _: 0.0, **options)
    actprune.prune(second, x[:1], [x], **options)
    for a, b in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_budget_that_is_met_changes_nothing():
    model, x = network(), torch.randn(20, 8)
    before = copy.deepcopy(model.state_dict())
    done = prune_trained(
        model,
        x[:1],
        [x],
        criterion=criteria.Variance(),
        budget=Budget(params=1.0),
        evaluate=lambda net: float(net[0].out_features),
    )
    assert (done.score_before, done.score_cut, done.score_after) == (40, 40, 40)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


# the readers' weights are computed: there is nothing to fold into
UNREAD = ("WeightNorm", "WeightNormLinear", "WeightStandardised")


@pytest.mark.parametrize("name", ZOO)
def test_every_net_of_the_zoo_is_pruned_and_refitted(name):
    model, _ = build(name)
    torch.manual_seed(1)
    batches = [ZOO[name].example() for _ in range(2)]
    actprune.prune(
        model,
        batches[0],
        batches,
        criterion=criteria.Variance() if name in UNREAD else criteria.Reconstruction(),
        budget=Budget(params=0.9),
        selection=Selection(max_ratio=0.6),
        compensation=LeastSquares(),
    )
    assert all(tensor.isfinite().all() for tensor in model.state_dict().values())
    assert model._surgery_record.steps


@pytest.mark.parametrize("name", UNREAD)
def test_groups_that_no_plain_weight_reads_have_no_reconstruction_error_and_stay_whole(name, caplog):
    model, example = build(name)
    options = {"criterion": criteria.Reconstruction(), "budget": Budget(params=0.97), "compensation": LeastSquares()}
    groups = {group.name for group in actprune.trace(model, example).unlocked}
    record = actprune.prune(model, example, [example], **options)
    (whole,) = groups - set(record.widths)
    assert f"these stay whole: {whole}" in caplog.text
    assert "pass compensation=LeastSquares()" in caplog.text


def test_reconstruction_without_compensation_says_what_it_needs():
    options = {"criterion": criteria.Reconstruction(), "budget": Budget(params=0.9), "compensation": None}
    with pytest.raises(ObservationError, match=r"scores none of 2 groups: .* pass compensation=LeastSquares\(\)"):
        actprune.Pruner(network(), torch.randn(1, 8), **options)


def test_without_compensation_the_network_is_as_it_was_cut():
    x, said = torch.randn(100, 8), []
    options = {"criterion": criteria.Variance(), "budget": Budget(params=0.5), "compensation": None}
    cut, pruned = network(), network()
    done = prune_trained(cut, x[:1], [x], evaluate=lambda net: said.append(net(x)) or 0.0, **options)
    actprune.prune(pruned, x[:1], [x], **options)
    assert done.params[1] < done.params[0]
    assert torch.equal(said[1], said[2])
    for a, b in zip(cut.parameters(), pruned.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("how", [LeastSquares(), LeastSquares(refit="once", recalibrate=False), Mean()])
def test_without_data_compensation_that_was_asked_for_says_so(how):
    with pytest.raises(ObservationError, match=f"{type(how).__name__} compensation needs activations: pass data="):
        actprune.prune(
            network(), torch.randn(1, 8), criterion=criteria.Magnitude(), budget=Budget(params=0.5), compensation=how
        )
