import math

import numpy as np
import pytest
import scipy.stats
import torch

from actprune.core.errors import ConfigError
from actprune.core.views import GroupView
from actprune.criteria import Entropy, StateEntropy
from actprune.criteria.entropy import entropy, miller_madow


def score(criterion, x):
    statistics = {key: [build(x.shape[1])] for key, build in criterion.statistics().items()}
    for (statistic,) in statistics.values():
        statistic.update(x, torch.arange(len(x)))
    return criterion.score(GroupView("g", x.shape[1], statistics))


COUNTS = torch.tensor([5.0, 3.0, 2.0, 0.0], dtype=torch.float64)


def test_exact_values():
    assert entropy(COUNTS).item() == pytest.approx(1.02965301, abs=1e-8)
    assert (entropy(COUNTS) + miller_madow(COUNTS)).item() == pytest.approx(1.12965301, abs=1e-8)
    assert entropy(torch.tensor([3.0, 1.0])).item() / math.log(2) == pytest.approx(0.81127812, abs=1e-7)


@pytest.mark.parametrize(("correction", "expected"), [("none", 1.02965301), ("miller_madow", 1.12965301)])
def test_exact_values_from_activations(correction, expected):
    """Five zeros, three ones, two threes: counts (5, 3, 2)."""
    x = torch.tensor([0.0] * 5 + [1.0] * 3 + [3.0] * 2).view(10, 1, 1)
    for options in ({}, {"range": "unit"}, {"pool": "gap"}, {"zero_bin": False}, {"bins": 4}):
        assert score(Entropy(bias_correction=correction, **options), x).item() == pytest.approx(expected, abs=1e-8)


def test_entropy_is_that_of_scipy():
    counts = np.random.default_rng(0).integers(0, 50, (7, 64))
    expected = torch.tensor(scipy.stats.entropy(counts, axis=1))
    torch.testing.assert_close(entropy(torch.tensor(counts).double()), expected)


def test_miller_madow_removes_most_of_the_bias():
    """Mean over many small samples of a known distribution; the plug-in estimate is biased low."""
    shares = np.array([0.4, 0.3, 0.15, 0.1, 0.05])
    counts = torch.tensor(np.random.default_rng(1).multinomial(40, shares, size=4000)).double()
    truth = scipy.stats.entropy(shares)
    plain, corrected = entropy(counts).mean() - truth, (entropy(counts) + miller_madow(counts)).mean() - truth
    assert plain < -0.04
    assert corrected.abs() < 0.2 * plain.abs()


def test_gaussian_units_in_a_common_range_rank_as_their_variance_and_alike_in_their_own():
    scales = torch.tensor([0.2, 1.0, 0.5, 2.0])
    x = torch.randn(4000, 4, 1, generator=torch.Generator().manual_seed(2)) * scales[:, None]
    assert torch.equal(score(Entropy(), x).argsort(), scales.argsort())
    own = score(Entropy(range="unit"), x)
    assert own.max() - own.min() < 0.25


def test_entropy_is_taken_once_and_not_averaged_over_batches():
    x = torch.arange(8.0).view(8, 1, 1)
    assert score(Entropy(), x).item() == pytest.approx(math.log(8))


def test_the_atom_at_zero_splits_the_entropy():
    """H = H2(p0) + (1 - p0) H(positive part)."""
    x = torch.randn(500, 1, 20, generator=torch.Generator().manual_seed(3)).relu()
    p0 = float((x == 0).double().mean())
    positive = score(Entropy(range="unit"), torch.cat([x[x > 0], x.max().view(1) * 1e-6]).view(-1, 1, 1)).item()
    expected = scipy.stats.entropy([p0, 1 - p0]) + (1 - p0) * positive
    assert score(Entropy(range="unit"), x).item() == pytest.approx(expected, abs=2e-3)


def test_state_entropy_counts_on_against_off():
    x = torch.tensor([[0.0, 0.0, 0.0, 2.0], [-1.0, 5.0, -1.0, 5.0], [1.0, 1.0, 1.0, 1.0]]).view(1, 3, 4)
    expected = [0.81127812 * math.log(2), math.log(2), 0]
    assert score(StateEntropy(), x).tolist() == pytest.approx(expected, abs=1e-8)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bias_correction": "jackknife"}, "bias_correction='jackknife' is not known; choose one of none, miller"),
        ({"bins": 0}, "bins=0 must be an integer in"),
        ({"bins": 64.5}, "bins=64.5 must be an integer in"),
        ({"bins": True}, "bins=True must be an integer in"),
        ({"range": "all"}, "range='all' is not known"),
        ({"pool": "max"}, "pool='max' is not known"),
    ],
)
def test_nonsense_is_refused_at_once(options, message):
    with pytest.raises(ConfigError, match=message):
        Entropy(**options)
