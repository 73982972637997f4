"""Statistics of several sites that are updated as one hold what each would hold by itself."""

from functools import partial

import pytest
import torch

from actprune.core.errors import ObservationError
from actprune.statistics import Activity, Histogram, LinearRademacher, Moments, merge_shards
from actprune.statistics.joined import join

SIZES = [3, 1, 5]
KINDS = {
    "activity": Activity,
    "moments": Moments,
    "layer range": Histogram,
    "unit range": partial(Histogram, bins=8, range="unit", zero_bin=False),
    "means": partial(Histogram, range="unit", pool="gap"),
    "rademacher": LinearRademacher,
    "positions": partial(LinearRademacher, pool="positions"),
}
each_kind = pytest.mark.parametrize("make", KINDS.values(), ids=KINDS.keys())


def batches():
    """Ranges that grow from batch to batch, and differ between sites; one has negative values."""
    generator = torch.Generator().manual_seed(3)
    for number in range(4):
        sites = [torch.randn(6, size, 8, generator=generator) * 10.0**k * 2**number for k, size in enumerate(SIZES)]
        yield [sites[0].relu(), sites[1], sites[2].relu()], torch.arange(6) + 6 * number


def same(part, alone):
    for name, state in alone.metric_state.items():
        torch.testing.assert_close(getattr(part, name), state, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(part.compute(), alone.compute(), rtol=1e-12, atol=1e-12)


@each_kind
def test_parts_hold_what_they_would_alone(make):
    """Joined after the first batch; in the third batch every part is updated by itself."""
    alone, parts, whole = [make(size) for size in SIZES], [make(size) for size in SIZES], None
    for number, (sites, ids) in enumerate(batches()):
        for statistic, x in zip(alone, sites, strict=True):
            statistic.update(x, ids)
        if number == 1:
            whole = join(parts, torch.device("cpu"))
        if number in (0, 2):
            for statistic, x in zip(parts, sites, strict=True):
                statistic.update(x, ids)
        else:
            with torch.inference_mode():
                whole.update(torch.cat(sites, 1), ids)
    for part, one in zip(parts, alone, strict=True):
        same(part, one)


@each_kind
def test_parts_that_are_joined_anew_keep_what_they_have(make):
    """As they are where a network goes to another device in the middle of an observation."""
    alone, parts = [make(size) for size in SIZES], [make(size) for size in SIZES]
    for sites, ids in batches():
        for statistic, x in zip(alone, sites, strict=True):
            statistic.update(x, ids)
        join(parts, torch.device("cpu")).update(torch.cat(sites, 1), ids)
    for part, one in zip(parts, alone, strict=True):
        same(part, one)


@each_kind
def test_another_is_like_the_first_and_has_nothing_of_it(make):
    with torch.inference_mode():
        first = make(SIZES[0])
        other = first.another()
    alone = make(SIZES[0])
    for sites, ids in batches():
        other.update(sites[0], ids)
        alone.update(sites[0], ids)
    same(other, alone)
    for name, state in make(SIZES[0]).metric_state.items():
        assert torch.equal(getattr(first, name), state)
    other.reset()
    same_states = {name: torch.equal(getattr(other, name), state) for name, state in first.metric_state.items()}
    assert all(same_states.values()), same_states
    with pytest.raises(ObservationError, match="saw 0 samples"):
        other.compute()


@each_kind
def test_copies_share_nothing_that_is_changed(make):
    """What one of them sees, or is merged into it, is in no other."""
    first, full = make(SIZES[0]), make(SIZES[0])
    merged, idle, late = (first.another() for _ in range(3))
    sites, ids = next(batches())
    full.update(sites[0], ids)
    merge_shards([[merged], [full]])
    torch.testing.assert_close(merged.compute(), full.compute(), rtol=1e-12, atol=1e-12)
    first.update(sites[0], ids)
    later = first.another()
    late.update(sites[0], ids)
    same(first, full)
    same(late, full)
    assert not later.update_called
    for name, state in make(SIZES[0]).metric_state.items():
        assert torch.equal(getattr(idle, name), state)
        assert torch.equal(getattr(later, name), state)


@each_kind
def test_parts_merge_like_any_other(make):
    shards = []
    for share in (slice(0, 3), slice(3, 6)):
        parts = [make(size) for size in SIZES]
        whole = join(parts, torch.device("cpu"))
        for sites, ids in batches():
            whole.update(torch.cat(sites, 1)[share], ids[share])
        shards.append(parts)
    alone = [make(size) for size in SIZES]
    for sites, ids in batches():
        for statistic, x in zip(alone, sites, strict=True):
            statistic.update(x, ids)
    for part, one in zip(merge_shards(shards), alone, strict=True):
        torch.testing.assert_close(part.compute(), one.compute(), rtol=1e-9, atol=1e-9)
        assert part.n_samples == one.n_samples


@each_kind
def test_a_nan_is_reported_by_its_own_part(make):
    parts = [make(size) for size in SIZES]
    whole = join(parts, torch.device("cpu"))
    for number, (sites, ids) in enumerate(batches()):
        if number == 2:
            sites[2][1, 4] = torch.nan
        whole.update(torch.cat(sites, 1), ids)
    parts[0].compute()
    parts[1].compute()
    with pytest.raises(ObservationError, match=r"1 of 5 units had NaN or Inf activations, .* first in batch 2;"):
        parts[2].compute()
