"""The contract of every criterion in the package; a new one without a case here fails."""

import dataclasses
import importlib
import inspect
import itertools
import math
import pkgutil
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import pytest
import scipy.spatial
import scipy.stats
import torch
from sklearn.metrics import mutual_info_score

import actprune.criteria
from actprune.core.errors import ObservationError
from actprune.core.views import Criterion, GroupView, Reader
from actprune.criteria import (
    FLAP,
    FPGM,
    RMS,
    BatchNormScale,
    Entropy,
    HRank,
    LabelInformation,
    Magnitude,
    MeanActivation,
    Rademacher,
    Random,
    Reconstruction,
    Sensitivity,
    StateEntropy,
    Taylor,
    Variance,
    Wanda,
    ZeroRate,
    ZeroUnits,
)

torch.set_num_threads(1)
N, U, SIDE = 8, 6, 3
LEVELS = 8
LABELS = torch.tensor([0, 2, 1, 0, 1, 1, 2, 0])
PERMUTATION = torch.tensor([4, 2, 5, 0, 3, 1])


def activations(seed=0):
    """Whole numbers 0..7, all of them taken, so that bins are beyond doubt; unit 3 is dead, unit 5 constant."""
    x = torch.randint(0, LEVELS, (N, U, SIDE * SIDE), generator=torch.Generator().manual_seed(seed)).float()
    x = (x - torch.arange(U)[:, None]).clamp(min=0)
    x[:, 3], x[:, 5] = 0, 2
    x[0, 0, :2] = torch.tensor([0.0, LEVELS - 1.0])
    return x


def slices():
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(U, 27, generator=generator), torch.randn(U, 1, generator=generator).double()]


# --- independent references: x is (N, U, P) float64 numpy, w is (U, elements) float64 numpy ---


def level_entropy(x, w, pool="positions", bias=False):
    if pool == "gap":
        x = x.mean(2, keepdims=True)
    result = []
    for unit in np.moveaxis(x, 1, 0).reshape(x.shape[1], -1):
        _, counts = np.unique(unit, return_counts=True)
        result.append(scipy.stats.entropy(counts) + bias * (len(counts) - 1) / (2 * counts.sum()))
    return np.array(result)


def binned_entropy(x, w):
    """Pooled, each unit in its own range; the means are ninths and no edge of 16 bins is near one."""
    pooled = x.astype(np.float32).mean(2)
    return np.array([scipy.stats.entropy(np.histogram(column, bins=16)[0]) for column in pooled.T])


def state_entropy(x, w):
    on = (x > 0).mean((0, 2))
    return scipy.stats.entropy(np.stack([on, 1 - on]))


SIGNS = np.array(list(itertools.product((-1, 1), repeat=N)))


def linear(x, w):
    return np.abs(SIGNS @ x.mean(2)).mean(0) / N


def layer(x, w):
    sums = SIGNS @ x.mean(2)
    without = np.stack([np.linalg.norm(np.delete(sums, u, axis=1), axis=1) for u in range(sums.shape[1])], axis=1)
    return (np.linalg.norm(sums, axis=1, keepdims=True) - without).mean(0) / N


def layer_closed(x, w):
    a = x.mean(2)
    return np.array([np.linalg.norm(a) - np.linalg.norm(np.delete(a, u, axis=1)) for u in range(a.shape[1])]) / N


def threshold(x, w, symmetric=True):
    result = []
    for a in x.mean(2).T:
        sums = np.stack([SIGNS[:, a >= t].sum(1) for t in np.unique(a)], axis=1)
        result.append(np.maximum(0, np.abs(sums) if symmetric else sums).max(1).mean() / N)
    return np.array(result)


def label_information(x, w, pool="gap", bias=False):
    if pool == "gap":
        x = x.mean(2, keepdims=True)
    labels = np.repeat(LABELS.numpy(), x.shape[2])
    result = []
    for unit in np.moveaxis(x, 1, 0).reshape(x.shape[1], -1):
        _, levels = np.unique(unit, return_inverse=True)
        filled = [len(np.unique(v, axis=0)) for v in (levels, labels, np.stack([levels, labels], axis=1))]
        correction = (filled[0] + filled[1] - filled[2] - 1) / (2 * len(unit))
        result.append(max(0, mutual_info_score(labels, levels) + bias * correction))
    return np.array(result)


def map_rank(x, w):
    maps = x.reshape(N, -1, SIDE, SIDE)
    return np.array([[np.linalg.matrix_rank(m) for m in row] for row in maps]).mean(0)


def greedy_reconstruction(x, w, ridge=0.01):
    """Every set of leavers is judged anew by the Schur complement of what stays."""
    rows = np.moveaxis(x, 1, 2).reshape(-1, x.shape[1])
    gram = np.cov(rows.T, bias=True)
    gram += ridge * gram.diagonal().mean() * np.eye(len(gram))

    def error(gone):
        kept = [u for u in range(len(gram)) if u not in gone]
        inner = gram[np.ix_(gone, gone)]
        if kept and gone:
            between = gram[np.ix_(kept, gone)]
            inner = inner - between.T @ np.linalg.solve(gram[np.ix_(kept, kept)], between)
        return np.trace(w[gone].T @ inner @ w[gone])

    gone, scores, highest = [], np.zeros(len(gram)), 0.0
    while len(gone) < len(gram) - 1:
        rises = {u: error([*gone, u]) - error(gone) for u in range(len(gram)) if u not in gone}
        worst = min(rises, key=rises.get)
        highest = max(highest, rises[worst])
        scores[worst] = highest
        gone.append(worst)
    scores[[u for u in range(len(gram)) if u not in gone]] = 2 * highest + 1e-12
    return scores


class Case(NamedTuple):
    criterion: Criterion
    reference: Callable
    rtol: float = 1e-6

    @property
    def name(self):
        options = ",".join(str(getattr(self.criterion, field.name)) for field in dataclasses.fields(self.criterion))
        return f"{type(self.criterion).__name__}({options})"


DRAWS = 4096
DRAWN = 8 / math.sqrt(DRAWS)  # relative error of a Monte Carlo mean, with room
CASES = [
    Case(Entropy(bins=LEVELS), level_entropy),
    Case(Entropy(bins=LEVELS, zero_bin=False), level_entropy),
    Case(Entropy(bins=LEVELS, bias_correction="miller_madow"), lambda x, w: level_entropy(x, w, bias=True)),
    Case(Entropy(bins=4096, range="unit"), level_entropy),
    Case(Entropy(bins=4096, pool="gap"), lambda x, w: level_entropy(x, w, pool="gap")),
    Case(Entropy(bins=16, range="unit", pool="gap", zero_bin=False), binned_entropy),
    Case(StateEntropy(), state_entropy),
    Case(Rademacher(estimate="monte_carlo", replicates=DRAWS), linear, DRAWN),
    Case(Rademacher(estimate="closed_form"), lambda x, w: np.linalg.norm(x.mean(2), axis=0) / N),
    Case(
        Rademacher(estimate="closed_form", pool="positions"),
        lambda x, w: np.linalg.norm(np.moveaxis(x, 1, 2).reshape(-1, x.shape[1]), axis=0) / (N * x.shape[2]),
    ),
    Case(Rademacher("layer", "monte_carlo", replicates=DRAWS), layer, DRAWN),
    Case(Rademacher("layer", "closed_form"), layer_closed),
    Case(Rademacher("threshold", replicates=DRAWS // 4), threshold, DRAWN),
    Case(Rademacher("threshold", replicates=DRAWS // 4, symmetric=False), lambda x, w: threshold(x, w, False), DRAWN),
    Case(LabelInformation(classes=3, bins=4096), label_information),
    Case(LabelInformation(3, 4096, "layer"), label_information),
    Case(LabelInformation(3, 1024, pool="positions"), lambda x, w: label_information(x, w, "positions")),
    Case(LabelInformation(3, 1024, pool="positions", zero_bin=False), lambda x, w: label_information(x, w, "positions")),
    Case(
        LabelInformation(3, 1024, pool="positions", bias_correction="miller_madow"),
        lambda x, w: label_information(x, w, "positions", bias=True),
    ),
    Case(FLAP(), lambda x, w: x.var((0, 2)) * (w**2).sum(1)),
    Case(Wanda(), lambda x, w: np.sqrt((x**2).mean((0, 2))) * np.abs(w).sum(1)),
    Case(BatchNormScale(), lambda x, w: (np.abs(w[:, :27]).mean(1) + np.abs(w[:, 27])) / 2),
    # statistics of gradients are given what the observation makes of them: here, x itself
    Case(Taylor(), lambda x, w: (x.sum(2) ** 2).mean(0)),
    Case(Sensitivity(), lambda x, w: np.abs(x).mean((0, 2))),
    Case(Sensitivity("lower_bound"), lambda x, w: np.abs(x).mean((0, 2))),
    Case(MeanActivation(), lambda x, w: np.abs(x.mean((0, 2)))),
    Case(RMS(), lambda x, w: np.sqrt((x**2).mean((0, 2)))),
    Case(Variance(), lambda x, w: x.var((0, 2))),
    Case(ZeroRate(), lambda x, w: (x != 0).mean((0, 2))),
    Case(HRank(), map_rank),
    Case(Magnitude(), lambda x, w: np.linalg.norm(w, axis=1)),
    Case(Magnitude(p=1), lambda x, w: np.abs(w).sum(1)),
    Case(FPGM(), lambda x, w: scipy.spatial.distance.cdist(w, w).sum(1)),
    Case(Reconstruction(ridge=0.01), greedy_reconstruction),
    Case(ZeroUnits(), lambda x, w: np.sqrt((w**2).mean(1))),
    Case(ZeroUnits(threshold=0.5), lambda x, w: np.sqrt((w**2).mean(1))),
    Case(Random(), None),  # draws by position: its own reference is in test_weight_criteria
]
each_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


def observe(criterion, *sites):
    """The criterion's statistics at every site, fed in uneven batches."""
    statistics = {}
    for key, build in criterion.statistics().items():
        statistics[key] = [build(x.shape[1]) for x in sites]
        if statistics[key][0].takes_maps:
            sites = [x.unflatten(2, (1, SIDE, SIDE)) for x in sites]
        for statistic, x in zip(statistics[key], sites, strict=True):
            for part, ids in zip(x.split([5, 1, 2]), torch.arange(N).split([5, 1, 2]), strict=True):
                statistic.update(part, ids, LABELS[ids]) if statistic.needs_labels else statistic.update(part, ids)
    return statistics


def view_of(criterion, *sites, weights=None, name="layer1.conv1", seed=0):
    weights = weights or slices()
    readers = [reader_of(x, weights) for x in sites]
    columns = [torch.cat([w.double() for w in weights], dim=1)] * len(sites)
    return GroupView(
        name,
        sites[0].shape[1],
        observe(criterion, *sites),
        lambda: weights,
        seed,
        lambda: readers,
        columns=lambda: columns,
        norms=lambda: weights,
        own=lambda: weights,
    )


def reader_of(x, weights):
    """A layer that reads each unit once, with all its slices as weights, and errors as they are."""
    rows = x.transpose(1, 2).reshape(-1, x.shape[1]).double()
    weight = torch.cat([w.double() for w in weights], dim=1).T
    return Reader(weight, torch.cov(rows.T, correction=0).reshape(x.shape[1], -1), torch.arange(x.shape[1])[:, None], 1.0)


def needs_data(case):
    return bool(case.criterion.statistics())


def test_every_criterion_has_a_case():
    found = set()
    for module in pkgutil.iter_modules(actprune.criteria.__path__):
        members = vars(importlib.import_module(f"actprune.criteria.{module.name}")).values()
        found |= {c for c in members if inspect.isclass(c) and issubclass(c, Criterion) and not inspect.isabstract(c)}
    assert found == {type(case.criterion) for case in CASES}
    assert {cls.__name__ for cls in found} <= set(actprune.criteria.__all__)


def test_every_criterion_is_a_frozen_dataclass_of_at_most_six_options_with_defaults():
    for cls in {type(case.criterion) for case in CASES}:
        assert dataclasses.is_dataclass(cls)
        assert cls.__dataclass_params__.frozen
        assert len(dataclasses.fields(cls)) <= 6
        assert cls() == cls()


@each_case
def test_scores_are_finite_float64_one_per_unit(case):
    score = case.criterion.score(view_of(case.criterion, activations()))
    assert score.dtype == torch.float64
    assert score.shape == (U,)
    assert score.device.type == "cpu"
    assert score.isfinite().all()
    assert not score.requires_grad


@pytest.mark.parametrize("case", [c for c in CASES if c.reference], ids=lambda case: case.name)
def test_scores_are_the_reference(case):
    x, weights = activations(), slices()
    expected = case.reference(x.double().numpy(), torch.cat([w.double() for w in weights], dim=1).numpy())
    actual = case.criterion.score(view_of(case.criterion, x, weights=weights))
    torch.testing.assert_close(actual, torch.as_tensor(expected), rtol=case.rtol, atol=1e-7)


@pytest.mark.parametrize("case", [c for c in CASES if c.reference], ids=lambda case: case.name)
def test_permuting_the_units_permutes_the_scores(case):
    x, weights = activations(), slices()
    score = case.criterion.score(view_of(case.criterion, x, x * 2, weights=weights))
    moved = [w[PERMUTATION] for w in weights]
    permuted = case.criterion.score(view_of(case.criterion, x[:, PERMUTATION], 2 * x[:, PERMUTATION], weights=moved))
    torch.testing.assert_close(permuted, score[PERMUTATION], rtol=1e-12, atol=1e-12)


@each_case
def test_a_group_of_one_unit_has_a_score(case):
    x, weights = activations()[:, :1], [w[:1] for w in slices()]
    score = case.criterion.score(view_of(case.criterion, x, weights=weights))
    assert score.shape == (1,)
    assert score.isfinite().all()


@each_case
def test_all_units_dead_or_all_weights_zero_still_score(case):
    x, weights = torch.zeros(N, U, SIDE * SIDE), [torch.zeros(U, 4)]
    score = case.criterion.score(view_of(case.criterion, x, x, weights=weights))
    assert score.shape == (U,)
    assert score.isfinite().all()


@pytest.mark.parametrize("case", [c for c in CASES if needs_data(c)], ids=lambda case: case.name)
def test_a_dead_unit_scores_least(case):
    score = case.criterion.score(view_of(case.criterion, activations()))
    assert score[3] == score.min()


@pytest.mark.parametrize("case", [c for c in CASES if needs_data(c)], ids=lambda case: case.name)
def test_without_its_statistic_it_says_so(case):
    with pytest.raises(ObservationError, match=r"group fc1 has no statistic '\w+' \(it has: other\); observe"):
        case.criterion.score(GroupView("fc1", U, {"other": []}))


@pytest.mark.parametrize("case", [c for c in CASES if needs_data(c)], ids=lambda case: case.name)
def test_without_samples_it_says_so(case):
    empty = {key: [build(U)] for key, build in case.criterion.statistics().items()}
    with pytest.raises(ObservationError, match=r"group fc1: \w+ saw 0 samples"):
        case.criterion.score(GroupView("fc1", U, empty, columns=lambda: [torch.ones(U, 2)]))


@pytest.mark.parametrize("case", [c for c in CASES if needs_data(c)], ids=lambda case: case.name)
def test_nan_is_an_error_that_names_the_group(case):
    x = activations()
    x[6, 2, 4] = math.nan
    with pytest.raises(ObservationError, match=r"group layer1.conv1: 1 of 6 units had NaN or Inf .* first in batch 2"):
        case.criterion.score(view_of(case.criterion, activations(), x))


@pytest.mark.parametrize("case", [c for c in CASES if needs_data(c)], ids=lambda case: case.name)
def test_scoring_changes_nothing(case):
    view = view_of(case.criterion, activations(), 3 * activations(1))
    first = case.criterion.score(view)
    assert torch.equal(case.criterion.score(view), first)
