"""Rank correlations within groups, against SciPy."""

import pytest
import scipy.stats
import torch

from actprune.pruning import EFFECT, GroupInfluence, Influence, agreement


def made(groups):
    return Influence(0, 0, 0.0, 0.0, 1, 1, ("a", "b", "flat", "some"), groups, [])


def group(name, seed, units=None):
    generator = torch.Generator().manual_seed(seed)
    a, b, noise = torch.randn(3, 12, generator=generator, dtype=torch.float64)
    scores = {"a": a.tolist(), "b": (a + b).tolist(), "flat": [1.0] * 12}
    if name == "one":
        scores["some"] = b.tolist()
    units = list(range(0, 12, 2)) if units is None else units
    return GroupInfluence(name, 12, 0, 0, scores, units, (a + noise)[units].tolist(), [0.0] * len(units), [])


def test_correlations_are_those_of_scipy_averaged_over_groups():
    groups = [group("one", 1), group("two", 2), group("three", 3), group("tiny", 4, [0, 1])]
    said = agreement(made(groups))
    k = {name: i for i, name in enumerate(said.names)}
    assert said.names == (EFFECT, "a", "b", "flat", "some")
    counted, measured = groups, groups[:3]
    effect = [scipy.stats.spearmanr([g.scores["b"][u] for u in g.units], g.unit_loss).statistic for g in measured]
    assert said.mean[k[EFFECT]][k["b"]] == pytest.approx(sum(effect) / 3)
    assert said.mean[k["b"]][k[EFFECT]] == said.mean[k[EFFECT]][k["b"]]
    assert said.n_groups[k[EFFECT]][k["b"]] == 3
    pairs = [scipy.stats.spearmanr(g.scores["a"], g.scores["b"]).statistic for g in counted]
    assert said.mean[k["a"]][k["b"]] == pytest.approx(sum(pairs) / 4)
    assert said.n_groups[k["a"]][k["b"]] == 4
    assert said.low[k["a"]][k["b"]] == pytest.approx(min(pairs), abs=0.1)  # of four groups, the least is often drawn
    assert said.high[k["a"]][k["b"]] == pytest.approx(max(pairs), abs=0.1)
    assert said.by_group["one"][k["a"]][k["b"]] == pytest.approx(pairs[0])
    tiny = said.by_group["tiny"]
    assert tiny[k["a"]][k["b"]] == pytest.approx(pairs[3])
    assert all(rho != rho for rho in tiny[k[EFFECT]])


def test_criteria_are_compared_where_few_units_were_measured():
    """Of 12 units, one or two: nothing is known of the effect, all of the criteria. Groups of two units say nothing."""
    few = [group("one", 1, [3]), group("two", 2, [0, 1])]
    small = GroupInfluence("small", 2, 0, 0, {"a": [1.0, 2.0], "b": [2.0, 1.0]}, [0, 1], [0.1, 0.2], [0.0] * 2, [])
    said, all_measured = agreement(made([*few, small])), agreement(made([group("one", 1), group("two", 2)]))
    known = [row[1:] for row in all_measured.mean[1:]]
    assert str([row[1:] for row in said.mean[1:]]) == str(known)  # NaN as NaN
    assert all(rho != rho for rho in said.mean[0])
    assert list(said.n_groups[0]) == [0] * 5
    assert list(said.by_group) == ["one", "two"]


def test_how_much_of_the_effect_is_noise():
    """A true effect with as much noise in each half: the ceiling is the correlation of their mean with the truth."""
    generator = torch.Generator().manual_seed(0)
    groups, truths = [], []
    for number in range(30):
        true, *noise = torch.randn(3, 400, generator=generator, dtype=torch.float64)
        halves = [(true + part).tolist() for part in noise]
        effect = (true + sum(noise) / 2).tolist()
        groups.append(GroupInfluence(str(number), 400, 0, 0, {}, range(400), effect, [0.0] * 400, [], halves))
        truths.append(scipy.stats.spearmanr(true, effect).statistic)
    said = agreement(made(groups))
    each = [scipy.stats.spearmanr(*g.unit_loss_halves).statistic for g in groups]
    assert said.halves == pytest.approx(sum(each) / len(each))
    assert said.ceiling == pytest.approx(sum(truths) / len(truths), abs=0.02)
    unknown = agreement(made([group("one", 1)]))
    assert unknown.halves != unknown.halves
    assert unknown.ceiling != unknown.ceiling


def test_what_cannot_be_ranked_is_not_counted():
    said = agreement(made([group("one", 1), group("two", 2)]))
    flat, some = (list(said.names).index(name) for name in ("flat", "some"))
    assert said.n_groups[0][flat] == 0
    assert said.mean[0][flat] != said.mean[0][flat]
    assert said.n_groups[0][some] == 1
    assert said.mean[0][some] == said.by_group["one"][0][some]
    assert said.low[0][some] != said.low[0][some]  # one group has no interval over groups
    assert said.low[0][1] <= said.mean[0][1] <= said.high[0][1]
