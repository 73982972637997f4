"""Selection: the budget is met to within one unit's worth, and the limits hold always."""

import itertools

import numpy as np
import pytest
import torch
from torch import nn

from actprune import Budget, Pruner, Selection, criteria, trace
from actprune.core.errors import BudgetError, ConfigError
from actprune.core.views import Criterion
from actprune.pruning.plans import draft
from actprune.pruning.select import normalise, select, select_below
from actprune.surgery import cut
from zoo import build

NETS = ["ConvBn", "Residual", "Dense", "Flatten", "Grouped", "AttentionPacked", "ConvNext"]


def drawn(graph, seed):
    generator = torch.Generator().manual_seed(seed)
    return {g.name: torch.rand(g.size, generator=generator, dtype=torch.float64) for g in graph.unlocked}


def cost(graph, unit, units):
    return graph.left(unit, graph.removed(units))


def sizes(graph):
    return {g.name: g.size for g in graph.unlocked}


def brute(graph, scores, unit, target, max_ratio):
    """Remove one unit after the other in the order of normalised scores, group order and index; stop at the target."""
    caps = {g.name: g.size - max(1, int(np.ceil(g.size * (1 - max_ratio) - 1e-9))) for g in graph.unlocked}
    queue = []
    for rank, group in enumerate(graph.unlocked):
        values = scores[group.name] / scores[group.name].abs().mean()
        lowest = sorted(range(group.size), key=lambda i: (values[i].item(), i))[: caps[group.name]]
        queue += [(values[i].item(), rank, position, group.name, i) for position, i in enumerate(lowest)]
    gone = {}
    for _, _, _, name, i in sorted(queue):
        if cost(graph, unit, gone) <= target:
            break
        gone.setdefault(name, []).append(i)
    return {name: sorted(units) for name, units in gone.items()}


@pytest.mark.parametrize("unit", ["params", "macs", "units"])
@pytest.mark.parametrize("name", NETS)
def test_bisection_equals_removing_one_by_one(name, unit):
    model, example = build(name)
    graph = trace(model, example)
    for seed, share in itertools.product(range(3), (0.9, 0.6, 0.4)):
        scores = drawn(graph, seed)
        target = share * (sum(sizes(graph).values()) if unit == "units" else graph.cost.evaluate(unit))
        chosen = select(graph, scores, unit, target, Selection(max_ratio=0.95), sizes(graph))
        assert chosen == brute(graph, scores, unit, target, 0.95)


@pytest.mark.parametrize("scope", ["global", "uniform"])
@pytest.mark.parametrize("name", NETS)
def test_the_budget_is_met_to_within_one_units_worth(name, scope):
    """Putting back any one unit of the plan costs more than the budget, or at least the last one does."""
    model, example = build(name)
    graph = trace(model, example)
    for share in (0.85, 0.7, 0.5):
        target = share * graph.params
        chosen = select(graph, drawn(graph, 1), "params", target, Selection(scope=scope, max_ratio=0.9), sizes(graph))
        after = cost(graph, "params", chosen)
        assert after <= target
        cheapest = min(
            cost(graph, "params", chosen | {g: [u for u in units if u != back]})
            for g, units in chosen.items()
            for back in units
        )
        dearest = max(
            cost(graph, "params", chosen | {g: [u for u in units if u != back]})
            for g, units in chosen.items()
            for back in units
        )
        assert dearest > target
        assert target - after < dearest - after
        assert cheapest >= after
        cut(*(m := build(name))[:1], draft(m[0], graph, chosen), m[1])
        assert sum(p.numel() for p in m[0].parameters()) == after


def test_nothing_leaves_when_the_target_is_met():
    model, example = build("ConvBn")
    graph = trace(model, example)
    assert select(graph, drawn(graph, 0), "params", graph.params, Selection(), sizes(graph)) == {}


def test_uniform_takes_the_same_share_of_every_group():
    model = nn.Sequential(
        nn.Linear(5, 40), nn.ReLU(), nn.Linear(40, 20), nn.ReLU(), nn.Linear(20, 60), nn.ReLU(), nn.Linear(60, 3)
    )
    graph = trace(model, torch.randn(2, 5))
    # scores of one group are far above those of the others: global would leave it alone
    scores = {g.name: torch.rand(g.size, dtype=torch.float64) + 100 * (g.size == 40) for g in graph.unlocked}
    chosen = select(graph, scores, "params", 0.4 * graph.params, Selection(scope="uniform"), sizes(graph))
    shares = {name: len(units) / graph.group(name).size for name, units in chosen.items()}
    assert len(shares) == 3
    assert max(shares.values()) - min(shares.values()) <= 1 / 20
    for name, units in chosen.items():
        assert set(units) == set(torch.argsort(scores[name])[: len(units)].tolist())
    only = select(graph, scores, "params", 0.8 * graph.params, Selection(normalise="none"), sizes(graph))
    assert "0" not in only


@pytest.mark.parametrize("name", [*NETS, "GroupedQueries", "SqueezeExcite"])
def test_half_of_the_units_is_half_of_every_group_where_all_lose_the_same_share(name):
    model, example = build(name)
    uniform = Selection(scope="uniform")
    pruner = Pruner(model, example, criteria.Random(), Budget(units=0.5), uniform, compensation=None)
    for due in (0.5, 1.0):
        if (plan := pruner.plan(None, due)) is not None:
            pruner.execute(plan)
    assert pruner.units_before == sum(before for _, before, _ in pruner.widths())
    assert pruner.units == sum(now for _, _, now in pruner.widths()) <= pruner.units_before / 2
    for _, before, now in pruner.widths():
        assert abs(now - before / 2) <= 1


@pytest.mark.parametrize("round_to", [2, 3, 4, 8])
def test_widths_that_are_cut_are_multiples(round_to):
    model = nn.Sequential(nn.Linear(5, 40), nn.ReLU(), nn.Linear(40, 24), nn.ReLU(), nn.Linear(24, 3))
    graph = trace(model, torch.randn(2, 5))
    for share in (0.8, 0.6, 0.4, 0.3):
        target = share * graph.params
        chosen = select(graph, drawn(graph, 2), "params", target, Selection(round_to=round_to), sizes(graph))
        assert cost(graph, "params", chosen) <= target
        for name, units in chosen.items():
            assert (graph.group(name).size - len(units)) % round_to == 0


def test_equal_scores_are_no_problem_and_always_cut_the_same():
    model, example = build("ConvBn")
    graph = trace(model, example)
    equal = {g.name: torch.ones(g.size, dtype=torch.float64) for g in graph.unlocked}
    for how in ("mean", "max", "standard", "rank", "none"):
        first = select(graph, equal, "params", 0.5 * graph.params, Selection(normalise=how), sizes(graph))
        assert first == select(graph, equal, "params", 0.5 * graph.params, Selection(normalise=how), sizes(graph))
        assert cost(graph, "params", first) <= 0.5 * graph.params
    zero = {name: torch.zeros_like(s) for name, s in equal.items()}
    assert cost(graph, "params", select(graph, zero, "params", 0.5 * graph.params, Selection(), sizes(graph))) > 0


def test_normalisers_against_their_formulas():
    scores = torch.tensor([3.0, -1.0, 2.0, 2.0], dtype=torch.float64)
    expected = {
        "mean": scores / 2.0,
        "max": scores / 3.0,
        "standard": (scores - 1.5) / np.std([3, -1, 2, 2]),
        "rank": torch.tensor([1.0, 0.25, 0.5, 0.75]),
        "none": scores,
    }
    for how, values in expected.items():
        torch.testing.assert_close(normalise(scores, how), values.double())


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"scope": "local"}, "scope='local' is not known; choose one of global, uniform"),
        ({"normalise": "l3"}, "normalise='l3' is not known"),
        ({"max_ratio": 1.0}, r"max_ratio=1.0 must be in \[0, 1\)"),
        ({"max_ratio": -0.1}, "max_ratio=-0.1"),
        ({"round_to": 0}, "round_to=0 must be at least 1"),
    ],
)
def test_settings_outside_their_range(options, match):
    with pytest.raises(ConfigError, match=match):
        Selection(**options)


def test_budgets_out_of_reach():
    model, example = build("ConvBn")
    with pytest.raises(BudgetError, match=r"the smallest reachable is [\d,]+ of [\d,]+: max_ratio=0.5 .* raise the budget"):
        Pruner(model, example, criteria.Random(), Budget(params=0.1), Selection(max_ratio=0.5))
    with pytest.raises(BudgetError, match="max_ratio=0.9, round_to=64 and locked groups .* or max_ratio or lower round_to"):
        Pruner(model, example, criteria.Random(), Budget(params=0.5), Selection(round_to=64))
    with pytest.raises(BudgetError, match="no unit may leave: .* max_ratio=0.0"):
        Pruner(model, example, criteria.Random(), Budget(params=0.5), Selection(max_ratio=0.0))
    single = nn.Sequential(nn.Linear(4, 1), nn.ReLU(), nn.Linear(1, 3))
    with pytest.raises(BudgetError, match="no unit may leave|no group whose units may leave"):
        Pruner(single, torch.randn(2, 4), criteria.Random(), Budget(params=0.5))
    with pytest.raises(BudgetError, match="Linear has no group whose units may leave.*reaches the model's output"):
        Pruner(nn.Linear(4, 3), torch.randn(2, 4), criteria.Random(), Budget(params=0.5))


class Biased(Criterion):
    """One group is always worst: the limits alone hold it."""

    def score(self, view):
        return torch.arange(view.size, dtype=torch.float64) * 1e-6 + (0.0 if view.name == "0" else 1.0)


@pytest.mark.parametrize("max_ratio", [0.25, 0.5, 0.75, 0.9])
def test_max_ratio_holds_over_several_steps(max_ratio):
    model = nn.Sequential(
        nn.Linear(5, 16), nn.ReLU(), nn.Linear(16, 10), nn.ReLU(), nn.Linear(10, 12), nn.ReLU(), nn.Linear(12, 3)
    )
    x = torch.randn(2, 5)
    reachable = Pruner(model, x, Biased(), Budget(params=0.999), Selection(max_ratio=max_ratio), None)
    least = {g.name: max(1, -(-round(g.size * (1 - max_ratio) * 1000) // 1000)) for g in reachable.graph.unlocked}
    floor = cost(reachable.graph, "params", {n: range(reachable.graph.group(n).size - k) for n, k in least.items()})
    share = floor / reachable.params + 1e-9
    pruner = Pruner(model, x, Biased(), Budget(params=share), Selection(max_ratio=max_ratio, normalise="none"), None)
    for due in (0.2, 0.4, 0.6, 0.8, 0.9, 1.0):
        plan = pruner.plan(None, due)
        if plan is not None:
            pruner.execute(plan)
        assert pruner.params <= pruner.target(due)
        for name, before, now in pruner.widths():
            assert now >= least[name], (name, before, now)
    assert {name: now for name, _, now in pruner.widths()} == least
    assert pruner.plan(None, 1.0) is None


def test_at_least_one_unit_stays_however_large_the_ratio():
    model, example = build("ConvBn")
    graph = trace(model, example)
    floor = cost(graph, "params", {g.name: range(1, g.size) for g in graph.unlocked})
    pruner = Pruner(
        model, example, criteria.Random(), Budget(params=floor / graph.params + 1e-9), Selection(max_ratio=0.999), None
    )
    pruner.execute(pruner.plan(None))
    assert [now for _, _, now in pruner.widths()] == [1, 1]
    model(example).sum().backward()


@pytest.mark.parametrize("name", ["GroupedThenGrouped", "Grouped", "AttentionPacked", "AttentionSeparate"])
def test_parts_of_a_last_unit_are_no_new_units(name):
    """A grouped convolution of one group looks like a plain one: its channels must not be cut one by one."""
    model, example = build(name)
    graph = trace(model, example)
    floor = cost(graph, "params", {g.name: range(1, g.size) for g in graph.unlocked})
    pruner = Pruner(
        model, example, criteria.Random(), Budget(params=floor / graph.params + 1e-9), Selection(max_ratio=0.99), None
    )
    names = {g.name for g in pruner.graph.unlocked}
    pruner.execute(pruner.plan(None, 1.0))
    assert {g.name for g in pruner.graph.unlocked} <= names
    assert all(now == 1 for _, _, now in pruner.widths())
    assert pruner.plan(None, 1.0) is None
    assert all(now >= 1 for _, now in pruner.record.widths.values())


def test_scores_that_are_not_finite_or_of_another_shape_are_refused():
    class Bad(Criterion):
        def __init__(self, value):
            self.value = value

        def score(self, view):
            return self.value

    from actprune.core.errors import ObservationError

    model, example = build("ConvBn")
    for value in (torch.tensor([1.0, float("nan")]), torch.ones(3), torch.full((8,), float("inf"))):
        pruner = Pruner(model, example, Bad(value), Budget(params=0.5), compensation=None)
        with pytest.raises(ObservationError, match="Bad must give 8 finite scores for group '0'"):
            pruner.plan(None)


def below(graph, scores, threshold, limit, max_ratio):
    """Remove units that score at most the threshold, lowest first, until the next one would go below the limit."""
    caps = {g.name: g.size - max(1, int(np.ceil(g.size * (1 - max_ratio) - 1e-9))) for g in graph.unlocked}
    queue = []
    for rank, group in enumerate(graph.unlocked):
        values = scores[group.name]
        lowest = sorted(range(group.size), key=lambda i: (values[i].item(), i))[: caps[group.name]]
        queue += [(values[i].item(), rank, k, group.name, i) for k, i in enumerate(lowest) if values[i] <= threshold]
    gone = {}
    for _, _, _, name, i in sorted(queue):
        if cost(graph, "params", {**gone, name: [*gone.get(name, []), i]}) < limit:
            break
        gone.setdefault(name, []).append(i)
    return {name: sorted(units) for name, units in gone.items()}


@pytest.mark.parametrize("name", NETS)
def test_a_threshold_takes_what_is_below_it_and_the_budget_is_a_limit(name):
    model, example = build(name)
    graph = trace(model, example)
    for seed, threshold, share in itertools.product(range(3), (-1.0, 0.0, 0.3, 2.0), (0.0, 0.6, 1.0)):
        scores = drawn(graph, seed)
        for score in scores.values():
            score[: len(score) // 3] = 0
        limit = share * graph.params
        chosen = select_below(graph, scores, threshold, "params", limit, Selection(max_ratio=0.95), sizes(graph))
        assert chosen == below(graph, scores, threshold, limit, 0.95)
        assert bool(chosen) == (threshold >= 0 and share < 1)
        assert cost(graph, "params", chosen) >= limit


def test_a_threshold_keeps_the_rounding_and_one_unit_of_every_group():
    model, example = build("ConvBn")
    graph = trace(model, example)
    zeros = {name: torch.zeros(size, dtype=torch.float64) for name, size in sizes(graph).items()}
    chosen = select_below(graph, zeros, 0.0, "params", 0.0, Selection(max_ratio=0.999), sizes(graph))
    assert {name: size - len(chosen[name]) for name, size in sizes(graph).items()} == dict.fromkeys(zeros, 1)
    rounded = select_below(graph, zeros, 0.0, "params", 0.0, Selection(max_ratio=0.999, round_to=4), sizes(graph))
    assert {name: size - len(rounded[name]) for name, size in sizes(graph).items()} == dict.fromkeys(zeros, 4)


def test_a_pruner_with_a_threshold_heeds_neither_the_schedule_nor_a_budget_out_of_reach():
    model, example = build("ConvBn")
    pruner = Pruner(model, example, criteria.ZeroUnits(), Budget(params=1e-6), compensation=None)
    assert pruner.plan(None) is None
    group = pruner.graph.unlocked[0]
    with torch.no_grad():
        for (tensor, dim), positions in group.members.items():
            if dim == 0 and tensor in dict(model.named_parameters()):
                model.get_parameter(tensor)[positions[2]] = 0
    assert pruner.plan(None, due=0.0).groups == {group.name: 1}
    assert Pruner(model, example, criteria.ZeroUnits(), Budget(params=1.0), compensation=None).plan(None) is None


@pytest.mark.parametrize("share", [0.1, 0.2, 0.57, 0.58])
def test_shares_of_units_are_met_exactly_where_they_can_be(share):
    model = nn.Sequential(nn.Linear(5, 100), nn.ReLU(), nn.Linear(100, 100), nn.ReLU(), nn.Linear(100, 3))
    uniform = Selection(scope="uniform")
    pruner = Pruner(model, torch.randn(2, 5), criteria.Random(), Budget(units=share), uniform, compensation=None)
    pruner.execute(pruner.plan(None))
    assert [now for _, _, now in pruner.widths()] == [round(100 * share)] * 2
    assert pruner.units <= pruner.target(1.0)
