"""How much every group loses: predicted reconstruction error per multiply-add, or per parameter, against every other way."""

import copy
import itertools

import pytest
import torch
from torch import nn

import actprune
from actprune import Budget, Pruner, criteria
from actprune.compensation import LeastSquares
from actprune.pruning.batches import observe_pairs, pairs_of
from actprune.pruning.plans import draft
from actprune.surgery import cut

TOKENS = 9


class Branches(nn.Module):
    """Three hidden layers between fixed widths: one over tokens (many multiply-adds), two after pooling (many parameters)."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(3)
        self.tokens = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 4))
        self.wide = nn.ModuleList(nn.Sequential(nn.Linear(8 + i, 6 - i), nn.Tanh(), nn.Linear(6 - i, 8 + i)) for i in (0, 3))

    def forward(self, x, pooled, other):
        return x + self.tokens(x), pooled + self.wide[0](pooled), other + self.wide[1](other)


def inputs(n=200):
    generator = torch.Generator().manual_seed(1)
    shapes = (TOKENS, 4), (8,), (11,)
    return tuple(torch.randn(n, *shape, generator=generator) for shape in shapes)


def pruner_of(unit, share=0.6):
    model, data = Branches(), inputs()
    pruner = Pruner(
        model,
        tuple(x[:1] for x in data),
        criteria.Reconstruction(),
        Budget(**{unit: share}),
        actprune.Selection(max_ratio=0.99),
        LeastSquares(positions=TOKENS),
    )
    return pruner, observe_pairs(pruner, pairs_of([data], data))


def counted(model, gone):
    """Parameters and multiply-adds once the given units are really gone."""
    smaller, data = copy.deepcopy(model), tuple(x[:1] for x in inputs())
    graph = actprune.trace(smaller, data)
    if any(gone.values()):
        cut(smaller, draft(smaller, graph, {name: list(range(n)) for name, n in gone.items() if n}), data)
    after = actprune.trace(smaller, data)
    return {"params": sum(p.numel() for p in smaller.parameters()), "macs": after.macs}


def test_scores_are_the_same_error_over_what_one_unit_really_frees():
    errors = {}
    for unit in ("params", "macs"):
        pruner, observation = pruner_of(unit)
        whole = counted(pruner.model, {})[unit]
        for name, score in pruner.scores(observation).items():
            freed = whole - counted(pruner.model, {name: 1})[unit]
            errors.setdefault(name, []).append(score * freed / whole)
    assert len(errors) == 3
    for by_params, by_macs in errors.values():
        torch.testing.assert_close(by_params, by_macs, rtol=1e-9, atol=0)


@pytest.mark.parametrize("unit", ["params", "macs"])
@pytest.mark.parametrize("share", [0.8, 0.6, 0.4])
def test_no_other_widths_free_as_much_for_less_error(unit, share):
    """Rises never fall within a group and every unit of a group frees the same, so the ranking is optimal for what it frees."""
    pruner, observation = pruner_of(unit, share)
    whole = counted(pruner.model, {})[unit]
    scores = pruner.scores(observation)
    freed = {name: whole - counted(pruner.model, {name: 1})[unit] for name in scores}
    rises = {name: (score * freed[name]).sort().values for name, score in scores.items()}
    chosen = pruner.plan(observation).groups
    assert counted(pruner.model, chosen)[unit] <= share * whole

    def error(widths):
        return sum(float(rises[name][:n].sum()) for name, n in widths.items())

    def saved(widths):
        return sum(n * freed[name] for name, n in widths.items())

    assert saved(chosen) == whole - counted(pruner.model, chosen)[unit]
    others = [
        dict(zip(rises, counts, strict=True)) for counts in itertools.product(*(range(len(rise)) for rise in rises.values()))
    ]
    as_much = [widths for widths in others if saved(widths) >= saved(chosen)]
    assert 1 < len(as_much) < len(others)
    assert error(chosen) <= min(map(error, as_much)) * (1 + 1e-9)


def test_macs_and_parameters_are_saved_in_different_places():
    """Over tokens a unit frees nine times its parameters in multiply-adds."""
    lost = {}
    for unit in ("params", "macs"):
        pruner, observation = pruner_of(unit)
        lost[unit] = pruner.plan(observation).groups
    assert lost["macs"].get("tokens.0", 0) > lost["params"].get("tokens.0", 0)
