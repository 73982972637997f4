"""Reconstruction error of wide groups against greedy removal by brute force, and scores that keep the order of removal."""

import numpy as np
import pytest
import torch

from actprune import Budget, prune
from actprune.compensation import LeastSquares
from actprune.core.views import GroupView, Reader
from actprune.criteria import Reconstruction
from actprune.criteria import reconstruction as module
from actprune.pruning.select import normalise

RIDGE = 1e-3
SIZES = (3.0, 0.7)


def readers(units, k, n_others=0, copies=False, seed=0):
    """Two layers that read the units at k places each, in an order of their own, beside units of other groups."""
    generator, found = torch.Generator().manual_seed(seed), []
    for size in SIZES:
        width = units * k + n_others
        mixed = torch.randn(width // 2, width, generator=generator, dtype=torch.float64)
        rows = (torch.randn(3000, width // 2, generator=generator, dtype=torch.float64) @ mixed).relu()
        columns = torch.randperm(width, generator=generator)[: units * k].view(units, k)
        if copies:
            rows[:, columns[units // 2 :]] = rows[:, columns[: units // 2]]
            rows[:, columns[1]] = 0
        weight = torch.randn(7, width, generator=generator, dtype=torch.float64)
        found.append(Reader(weight, torch.cov(rows.T, correction=0), columns, size))
    return found


def loss(layers, gone, ridge=RIDGE):
    """What is lost when the units leave and the rest is refitted: the Schur complement of what stays."""
    total = 0.0
    for layer in layers:
        gram = layer.covariance.numpy()
        gram = gram + ridge * gram.diagonal().mean() * np.eye(len(gram))
        out = layer.columns[list(gone)].flatten().numpy()
        kept = np.setdiff1d(np.arange(len(gram)), out)
        between = gram[np.ix_(kept, out)]
        inner = gram[np.ix_(out, out)] - between.T @ np.linalg.solve(gram[np.ix_(kept, kept)], between)
        weight = layer.weight.numpy()[:, out]
        total += np.trace(weight @ inner @ weight.T) / layer.size
    return total


def score_of(layers, monkeypatch=None, **options):
    """Scores; and the rises, in the order of removal."""
    rises = []
    if monkeypatch is not None:
        plain = module._rising
        monkeypatch.setattr(module, "_rising", lambda values: rises.extend(values) or plain(values))
    view = GroupView("g", len(layers[0].columns), readers=lambda: layers)
    return Reconstruction(**options).score(view), rises


@pytest.mark.parametrize(("units", "k", "n_others"), [(40, 1, 5), (18, 3, 0), (5, 2, 3), (2, 1, 0)])
def test_every_unit_is_the_cheapest_of_those_left_when_it_leaves(units, k, n_others):
    layers = readers(units, k, n_others)
    order = score_of(layers)[0].argsort(stable=True).tolist()
    for n in range(units - 1):
        errors = {unit: loss(layers, [*order[:n], unit]) for unit in order[n:]}
        assert errors[order[n]] <= min(errors.values()) * (1 + 1e-9)


@pytest.mark.parametrize(("ridge", "rtol"), [(1e-3, 1e-10), (1e-6, 1e-7), (1e-9, 1e-4)])
@pytest.mark.parametrize("k", [1, 2])
def test_errors_add_up_to_the_loss_of_the_whole_set_beside_copies_and_dead_units(k, ridge, rtol, monkeypatch):
    layers = readers(70, k, copies=True)
    score, rises = score_of(layers, monkeypatch, ridge=ridge)
    order = score.argsort(stable=True).tolist()
    for n in (1, 31, 32, 33, 50, 65, 69):
        assert sum(rises[:n]) == pytest.approx(loss(layers, order[:n], ridge), rel=rtol)


def test_of_two_units_that_are_nearly_the_same_one_stays():
    torch.manual_seed(1)
    pairs = 32
    model = torch.nn.Sequential(torch.nn.Linear(20, 2 * pairs), torch.nn.ReLU(), torch.nn.Linear(2 * pairs, 10)).eval()
    with torch.no_grad():
        model[0].weight[pairs:] = model[0].weight[:pairs] + 0.005 * torch.randn(pairs, 20)
        model[0].bias[pairs:] = model[0].bias[:pairs]
    x, unseen = torch.randn(4000, 20), torch.randn(1000, 20)
    with torch.no_grad():
        before = model(unseen)
        prune(
            model,
            x[:2],
            list(x.split(500)),
            criterion=Reconstruction(),
            budget=Budget(units=0.5),
            compensation=LeastSquares(),
        )
        lost = (model(unseen) - before).square().mean() / before.var()
    assert model[0].out_features == pairs
    assert lost < 1e-3


@pytest.mark.parametrize("how", ["none", "mean", "max", "standard"])
def test_scores_rise_in_the_order_of_removal_also_once_normalised(how):
    """Rises that are equal, fall, are zero, or vanish beside the greatest."""
    rises = [0.0, 0.0, 1e-30, 0.3, 0.3, 0.1, 0.2, 1e4] + [2e4 - i for i in range(3000)]
    scores = module._rising(rises)
    assert (normalise(scores / 0.0123, how).diff() > 0).all()
    highest = np.maximum.accumulate(rises)
    np.testing.assert_allclose(scores[:-1], highest, rtol=0, atol=1e-8 * highest.max())


def test_where_nothing_is_lost_the_order_of_removal_is_kept():
    layers = [Reader(torch.zeros(3, 50), torch.eye(50, dtype=torch.float64), torch.arange(50)[:, None], 0.0)]
    score, _ = score_of(layers)
    assert len(score.unique()) == 50
    assert score.max() < 1e-11
