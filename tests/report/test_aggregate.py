from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from actprune.report.aggregate import Spread, aggregate
from actprune.report.runs import Run


def run(criterion, seed, accuracy, **keys):
    pruned = criterion != "none"
    base = Run(
        path=Path("x"),
        criterion=criterion,
        seed=seed,
        params_before=1000,
        params_after=400 + seed if pruned else 1000,
        macs_before=5000,
        macs_after=3000 - seed if pruned else 5000,
        test_accuracy=accuracy,
        val_accuracy=accuracy / 2,
        seconds=float(seed),
        data="digits",
        model="mlp",
        budget="params=0.4" if pruned else "",
    )
    return replace(base, **keys)


ENTROPY = {1: 0.91, 2: 0.95, 3: 0.90}
NONE = {1: 0.97, 2: 0.96, 3: 0.99}


def three_seeds():
    return [run("entropy", s, a) for s, a in ENTROPY.items()] + [run("none", s, a) for s, a in NONE.items()]


def test_spread_is_that_of_numpy():
    values = list(np.random.default_rng(0).normal(0.9, 0.01, 7))
    spread = Spread.of(values)
    assert spread.mean == pytest.approx(np.mean(values), abs=1e-15)
    assert spread.std == pytest.approx(np.std(values, ddof=1), rel=1e-12)
    assert spread.n == 7


def test_spread_of_one_value_does_not_exist():
    assert Spread.of([0.5]) == Spread(0.5, None, 1)


def test_rows_are_means_over_seeds_and_differences_are_paired():
    (none, entropy), notes = aggregate(three_seeds())
    assert notes == []
    assert none.is_baseline
    assert none.difference is None
    assert entropy.seeds == (1, 2, 3)
    accuracy, baseline = np.array(list(ENTROPY.values())), np.array(list(NONE.values()))
    assert entropy.accuracy.mean == pytest.approx(accuracy.mean())
    assert entropy.accuracy.std == pytest.approx(accuracy.std(ddof=1))
    assert entropy.difference.mean == pytest.approx((accuracy - baseline).mean())
    assert entropy.difference.std == pytest.approx((accuracy - baseline).std(ddof=1))
    assert entropy.params.mean == pytest.approx(402)
    assert entropy.params.std == pytest.approx(1)
    assert entropy.macs.mean == pytest.approx(2998)
    assert entropy.val_accuracy.mean == pytest.approx(accuracy.mean() / 2)
    assert entropy.seconds.mean == pytest.approx(2)
    assert entropy.points == tuple((400 + s, a) for s, a in ENTROPY.items())


def test_the_order_of_runs_does_not_matter():
    assert aggregate(three_seeds()) == aggregate(three_seeds()[::-1])


def test_a_missing_seed_is_said_and_the_difference_is_over_common_seeds():
    runs = [r for r in three_seeds() if (r.criterion, r.seed) != ("none", 2)]
    (none, entropy), notes = aggregate(runs)
    assert notes == ["none: seed 2 missing, has seeds 1, 3"]
    assert none.accuracy.n == 2
    assert entropy.accuracy.n == 3
    assert entropy.difference.n == 2
    assert entropy.difference.mean == pytest.approx(np.mean([0.91 - 0.97, 0.90 - 0.99]))


def test_no_common_seed_means_no_difference():
    (_, entropy), notes = aggregate([run("entropy", 1, 0.9), run("none", 2, 0.95)])
    assert entropy.difference is None
    assert any("no seed in common" in note for note in notes)


def test_no_baseline_is_said():
    _, notes = aggregate([run("entropy", 1, 0.9), run("random", 1, 0.8)])
    assert notes == ["no baseline to compare with (run pruner=none with the same seeds)"]


def test_a_seed_that_ran_twice_counts_once():
    (row,), notes = aggregate([run("none", 1, 0.9), run("none", 1, 0.8), run("none", 2, 0.7)])
    assert row.seeds == (1, 2)
    assert row.accuracy.mean == pytest.approx((0.85 + 0.7) / 2)
    assert notes == ["none: seed 1 was run more than once; its runs are averaged and count as one"]


@pytest.mark.parametrize("change", [{"data": "mnist"}, {"model": "vgg"}, {"params_before": 2000}, {"macs_before": 6000}])
def test_different_data_and_models_are_kept_apart(change):
    there = [replace(r, **change) for r in three_seeds() if r.criterion == "entropy"]
    rows, notes = aggregate(three_seeds() + there)
    assert len(rows) == 3
    assert len({row.section for row in rows}) == 2
    alone = next(row for row in rows if all(getattr(row.section, key) == value for key, value in change.items()))
    assert alone.difference is None  # the other section's baseline says nothing here
    assert len(notes) == 1


def test_budgets_and_configs_are_kept_apart():
    runs = three_seeds() + [replace(r, budget="params=0.2") for r in three_seeds() if r.criterion == "entropy"]
    runs += [replace(r, overrides=("schedule=one_shot",)) for r in three_seeds() if r.criterion == "entropy"]
    rows, notes = aggregate(runs)
    assert [(row.criterion, row.budget, row.config) for row in rows] == [
        ("none", "", ()),
        ("entropy", "params=0.2", ()),
        ("entropy", "params=0.4", ()),
        ("entropy", "params=0.4", ("schedule=one_shot",)),
    ]
    assert notes == []
    assert all(row.difference.n == 3 for row in rows[1:])  # a schedule has no effect on the baseline


def test_pruning_settings_do_not_split_the_baseline():
    runs = [run("none", 1, 0.9, overrides=("schedule=linear",)), run("none", 2, 0.8, budget="params=0.4")]
    rows, _ = aggregate(runs)
    assert len(rows) == 1
    assert rows[0].config == ()


def test_the_baseline_must_be_trained_alike():
    longer = ("trainer.max_epochs=99",)
    runs = three_seeds() + [replace(r, overrides=longer) for r in three_seeds() if r.criterion == "entropy"]
    rows, notes = aggregate(runs)
    assert rows[-1].config == longer
    assert rows[-1].difference is None
    assert len(notes) == 1
    assert "entropy params=0.4 trainer.max_epochs=99: no baseline with the same training settings" in notes[0]


def test_best_first_after_the_baseline():
    rows, _ = aggregate([run(c, 1, a) for c, a in (("random", 0.8), ("none", 0.7), ("entropy", 0.9), ("magnitude", 0.85))])
    assert [row.criterion for row in rows] == ["none", "entropy", "magnitude", "random"]


def test_a_value_that_one_run_lacks_is_not_averaged():
    rows, _ = aggregate([run("none", 1, 0.9), run("none", 2, 0.9, val_accuracy=None, seconds=None)])
    assert rows[0].val_accuracy is None
    assert rows[0].seconds is None


def test_mixed_code_is_said():
    runs = [run("none", 1, 0.9, commit="a" * 40, versions="1"), run("none", 2, 0.9, commit="", versions="2")]
    _, notes = aggregate(runs)
    assert notes == [
        "the runs come from 2 commits: aaaaaaaaaaaa, unknown",
        "the runs come from 2 sets of library versions",
    ]
