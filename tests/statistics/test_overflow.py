"""Finite activations near the end of float32: counted right, or reported for what they are."""

from functools import partial

import pytest
import torch

from actprune.core.errors import ObservationError
from actprune.statistics import (
    Activity,
    ClassHistogram,
    GateTaylor,
    Gram,
    Histogram,
    LinearRademacher,
    MapRank,
    Moments,
    Sensitivity,
)

KINDS = {
    "activity": Activity,
    "histogram": Histogram,
    "unit": partial(Histogram, range="unit", pool="gap"),
    "labels": ClassHistogram,
    "moments": Moments,
    "gram": Gram,
    "rademacher": LinearRademacher,
    "positions": partial(LinearRademacher, pool="positions"),
    "taylor": GateTaylor,
    "sensitivity": Sensitivity,
    "rank": MapRank,
}
each_kind = pytest.mark.parametrize("make", KINDS.values(), ids=KINDS.keys())
EXPONENTS = [17, 18, 64, 90, 121, 127]
# how each of a unit's values grows with its activations; of a Gram the last is the covariance with the other unit
POWERS = {"moments": [1, 2], "gram": [1, 2, 1], "rademacher": [1], "positions": [1], "taylor": [2], "sensitivity": [1]}


def maps(exponent=0):
    """Powers of two times a few digits: scaled exactly."""
    x = torch.randint(4, 8, (6, 2, 64), generator=torch.Generator().manual_seed(0)).float()
    x[:, 1] -= 3
    return x * torch.tensor([2.0**exponent / 8, 1.0]).view(1, 2, 1)


def seen(make, x, **options):
    statistic = make(2)
    statistic.update(x, torch.arange(len(x)), torch.arange(len(x)) % 3, **options)
    return statistic


@pytest.mark.parametrize("exponent", EXPONENTS)
@pytest.mark.parametrize("kind", KINDS)
def test_large_numbers_are_right_or_said_to_be_too_large(kind, exponent):
    statistic, plain = seen(KINDS[kind], maps(exponent)), seen(KINDS[kind], maps()).compute()
    if statistic.nonfinite.any():
        assert exponent > 63
        said = r"1 of 2 units had NaN or Inf activations, or such above 1.8e\+19 whose squares or sums .* first in batch 0;"
        with pytest.raises(ObservationError, match=said):
            statistic.compute()
        return
    found = statistic.compute()
    assert found.isfinite().all()
    if kind in POWERS:
        scale = torch.tensor([2.0 ** (exponent * power) for power in POWERS[kind]], dtype=torch.float64)
        torch.testing.assert_close(found[0], (plain[0] * scale).view_as(found[0]), rtol=1e-5, atol=0)


@each_kind
@pytest.mark.parametrize("value", [1e37, torch.inf])
def test_of_batches_counted_together_the_one_that_overflows_is_named(make, value):
    x = torch.ones(6, 2, 64)
    x[4:, 1] = value
    statistic = seen(make, x, sizes=[3, 1, 2], batches=[5, 7, 8])
    assert statistic.nonfinite.any() or value != torch.inf
    if statistic.nonfinite.any():
        with pytest.raises(ObservationError, match=r"1 of 2 units .* first in batch 8;"):
            statistic.check()


@pytest.mark.parametrize("kind", ["moments", "positions"])
def test_sums_that_overflow_are_found(kind):
    assert seen(KINDS[kind], maps(127)).nonfinite.tolist() == [1, 0]


def test_squares_that_overflow_in_sum_alone_are_of_a_batch_of_this_process():
    statistic = seen(KINDS["positions"], torch.full((4, 2, 64), 1e19), sizes=[2, 2], batches=[3, 4])
    with pytest.raises(ObservationError, match="2 of 2 units .* first in batch 3;"):
        statistic.check()
