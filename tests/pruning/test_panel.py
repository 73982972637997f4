"""Many criteria on one observation say what each says alone."""

import pytest
import torch

from actprune import Budget, Pruner, analyze, criteria
from actprune.core.errors import ConfigError, ObservationError
from actprune.core.views import GroupView
from actprune.pruning import Panel, Removals
from actprune.pruning.batches import observe_pairs
from actprune.statistics import Moments
from zoo import build

CHOSEN = {
    "entropy": criteria.Entropy(),
    "fine": criteria.Entropy(bins=128),
    "information": criteria.LabelInformation(classes=4),
    "linear": criteria.Rademacher(),
    "layer": criteria.Rademacher(function_class="layer"),
    "rms": criteria.RMS(),
    "variance": criteria.Variance(),
    "flap": criteria.FLAP(),
    "taylor": criteria.Taylor(),
    "sensitivity": criteria.Sensitivity(),
    "magnitude": criteria.Magnitude(),
    "random": criteria.Random(),
}


def scores(criterion):
    model, example = build("ConvBn")
    torch.manual_seed(0)
    pairs = [(torch.randn(5, *example.shape[1:]), torch.randint(0, 4, (5,))) for _ in range(3)]
    pruner = Pruner(model, example, criterion, Budget(params=0.9))
    return pruner.scores(observe_pairs(pruner, pairs))


def test_each_says_what_it_says_alone():
    panel = Panel(CHOSEN)
    first = scores(panel)
    for name, criterion in CHOSEN.items():
        for group, alone in scores(criterion).items():
            torch.testing.assert_close(panel.scores[group][name], alone, rtol=0, atol=0)
    assert all(torch.equal(first[group], by["entropy"]) for group, by in panel.scores.items())


def test_what_is_asked_for_twice_is_accumulated_once():
    statistics = Panel(CHOSEN).statistics()
    kinds = [type(make(3)).__name__ for make in statistics.values()]
    assert sorted(kinds) == sorted(
        ["Histogram", "Histogram", "ClassHistogram", "LinearRademacher", "Moments", "GateTaylor", "Sensitivity"]
    )


def test_what_cannot_be_compared_is_not_shared():
    class Weighted(Moments):
        def __init__(self, n_units, weight):
            super().__init__(n_units)
            self.weight = torch.tensor(weight)

    class Criterion(criteria.RMS):
        def statistics(self):
            return {"moments": lambda n: Weighted(n, 1.0)}

    assert len(Panel({"one": Criterion(), "other": Criterion(), "plain": criteria.RMS()}).statistics()) == 3


def test_a_group_that_one_of_them_cannot_score():
    panel = Panel({"scale": criteria.BatchNormScale(), "magnitude": criteria.Magnitude()})
    model, example = build("Flatten")
    pruner = Pruner(model, example, panel, Budget(params=0.9), compensation=None)
    found = pruner.scores(None)
    assert set(found) == {group.name for group in pruner.graph.unlocked}
    assert all(set(by) in ({"magnitude"}, {"magnitude", "scale"}) for by in panel.scores.values())
    assert any("scale" not in by for by in panel.scores.values())


def test_a_panel_of_none_raises():
    with pytest.raises(ConfigError, match="a panel of 0 criteria"):
        Panel({})


@pytest.mark.parametrize("said", [torch.tensor([1.0, float("nan")]), torch.ones(1)], ids=["nan", "of one unit"])
def test_each_of_them_has_to_give_finite_scores(said):
    class Bad(criteria.Random):
        def score(self, view):
            return said

    panel = Panel({"random": criteria.Random(), "bad": Bad()})
    with pytest.raises(ObservationError, match="Bad must give 2 finite scores for group 'one'"):
        panel.score(GroupView("one", 2))


def test_units_are_taken_in_the_order_of_scores_that_differ_by_little():
    class Ranked(criteria.Random):
        def score(self, view):
            return super().score(view).argsort().double()

    class Close(Ranked):
        def score(self, view):
            return 1 + 2.0**-40 * super().score(view)

    model, example = build("ConvBn")
    torch.manual_seed(0)
    pairs = [(torch.randn(5, *example.shape[1:]), torch.randint(0, 4, (5,)))]
    removals = Removals(shares=(0.25, 0.5), n_units=1, draws=1)
    found = analyze(model, example, pairs, pairs, criteria={"ranked": Ranked(), "close": Close()}, removals=removals)
    for group in found.groups:
        losses = {name: [r.loss for r in group.removals if r.criterion == name] for name in found.criteria}
        assert losses["close"] == losses["ranked"]
        assert len(losses["close"]) == 4
