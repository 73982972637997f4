import itertools
import math
import weakref

import pytest
import scipy.stats
import torch

from actprune.core.errors import ConfigError, ObservationError
from actprune.statistics import LinearRademacher, counter


class AllSigns(LinearRademacher):
    """Every sign vector exactly once instead of drawn ones: the expectation itself."""

    def __init__(self, n_units, n):
        super().__init__(n_units, replicates=2**n)
        self.every = torch.tensor(list(itertools.product((-1.0, 1.0), repeat=n)), dtype=torch.float64).T

    def _signs(self, sample_ids, positions):
        return self.every[sample_ids]


@pytest.mark.parametrize(("a", "expected"), [((1, 1), 0.5), ((1, 2, 3, 4), 1.125), ((0, 0, 0, 5), 1.25), ((1, 1, 1, 1), 0.375)])
def test_exact_values(a, expected):
    statistic = AllSigns(1, len(a))
    for i, value in enumerate(a):
        statistic.update(torch.full((1, 1, 1), float(value)), torch.tensor([i]))
    assert statistic.compute().tolist() == [expected]
    lower, upper = statistic.bounds()
    norm = math.sqrt(sum(v * v for v in a)) / len(a)
    assert upper.item() == pytest.approx(norm, rel=1e-15)
    assert lower.item() == pytest.approx(norm / math.sqrt(2), rel=1e-15)
    assert lower - 1e-15 <= statistic.compute() <= upper + 1e-15


@pytest.mark.parametrize("pool", ["gap", "positions"])
def test_estimate_lies_near_its_limit_and_ranks_as_the_norm(pool):
    scales = torch.linspace(0.1, 2, 40)
    x = torch.randn(400, 40, 4, generator=torch.Generator().manual_seed(0)) * scales[:, None]
    statistic = LinearRademacher(40, replicates=256, pool=pool)
    statistic.update(x, torch.arange(400))
    relative = statistic.compute() / statistic.normal_limit()
    assert (relative - 1).abs().max() < 5 * math.sqrt(math.pi / 2 - 1) / 16
    assert relative.mean() == pytest.approx(1, abs=0.05)
    assert scipy.stats.spearmanr(statistic.compute(), statistic.bounds()[1]).statistic > 0.98
    terms = x.mean(2) if pool == "gap" else x.movedim(1, 2).flatten(0, 1)
    torch.testing.assert_close(statistic.bounds()[1], terms.double().norm(dim=0) / len(terms))


def test_positions_are_drawn_in_chunks_of_samples(monkeypatch):
    x = torch.randn(9, 3, 8, generator=torch.Generator().manual_seed(1))
    whole, chunked = (LinearRademacher(3, replicates=65, pool="positions") for _ in range(2))
    whole.update(x, torch.arange(9))
    monkeypatch.setattr("actprune.statistics.rademacher._SIGNS_AT_ONCE", 65 * 8 * 2)
    chunked.update(x, torch.arange(9))
    torch.testing.assert_close(chunked.compute(), whole.compute(), rtol=1e-12, atol=0)


def test_signs_are_drawn_once_per_batch_and_kept_no_longer(monkeypatch):
    drawn = []

    def signs(*args):
        made = counter.signs(*args)
        drawn.append(weakref.ref(made))
        return made

    monkeypatch.setattr("actprune.statistics.rademacher.signs", signs)
    ids, sites = torch.arange(9), [LinearRademacher(3), LinearRademacher(5)]
    for site in sites:
        site.update(torch.randn(9, site.n_units, 4), ids)
    assert len(drawn) == 1
    assert drawn[0]() is not None
    del ids
    assert drawn[0]() is None


def test_without_replicates_only_the_bounds_are_known():
    statistic = LinearRademacher(2, replicates=0)
    with pytest.raises(ObservationError, match="saw 0 samples"):
        statistic.bounds()
    statistic.update(torch.ones(4, 2, 3), torch.arange(4))
    assert statistic.bounds()[1].tolist() == [0.5, 0.5]
    with pytest.raises(ConfigError, match=r"replicates=0 leaves nothing to estimate from; ask for bounds\(\)"):
        statistic.compute()


def test_pooled_maps_must_not_be_sampled():
    assert LinearRademacher(3).whole_maps
    assert not LinearRademacher(3, pool="positions").whole_maps


@pytest.mark.parametrize(
    ("options", "message"), [({"replicates": -1}, "replicates=-1 must be 0 or more"), ({"pool": "max"}, "pool='max'")]
)
def test_nonsense_is_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        LinearRademacher(3, **options)
