"""Updates that wait for their likes: nothing is lost or doubled, whatever comes in whatever order."""

import pytest
import torch

from actprune.pruning import updates
from actprune.pruning.updates import Part, Updates
from actprune.statistics import Activity, Histogram, MapRank


@pytest.mark.parametrize("at_once", [1, 100, 10**9])
@pytest.mark.parametrize("make", [Activity, Histogram, MapRank])
def test_every_company_of_sites_gives_the_same(at_once, make, monkeypatch):
    """Sites in another order, one that is missing, one that comes twice, and maps of another size."""
    monkeypatch.setattr(updates, "AT_ONCE_ON_CPU", at_once)
    torch.manual_seed(0)
    sizes, waiting = [2, 4, 3], Updates()
    later, alone = ([make(size) for size in sizes] for _ in range(2))
    places = [[Part("key", make, statistic)] for statistic in later]
    for number, order in enumerate([[0, 1, 2], [0, 1, 2], [2, 0, 1], [0, 2], [1, 1, 0], [0, 1, 2]]):
        ids = torch.arange(5) + 5 * number
        for site in order:
            x = torch.randn(5, sizes[site], 9 if number < 5 else 4).relu()
            if places[site][0].waits:
                waiting.add(places[site], x, ids)
            else:
                later[site].update(x, ids)
            alone[site].update(x, ids)
        if number != 1:  # the next batch's ids keep it apart all the same
            waiting.flush()
    for a, b in zip(later, alone, strict=True):
        assert torch.equal(a.compute(), b.compute())
        assert a.n_samples == b.n_samples


def test_the_batch_of_a_nan_is_named_whether_it_was_joined_or_not():
    waiting, statistics = Updates(), [Activity(2), Activity(2)]
    places = [[Part("key", Activity, statistic)] for statistic in statistics]
    for number, order in enumerate([[0, 1], [0, 1], [1]]):
        for site in order:
            x = torch.full((3, 2, 4), torch.nan if number == 2 else 1.0)
            waiting.add(places[site], x, torch.arange(3))
        waiting.flush()
        waiting.batch_ends()
    assert statistics[1].first_nonfinite.tolist() == [2.0, 2.0]
    assert statistics[0].first_nonfinite.isinf().all()


def test_batches_of_another_size_come_in_the_same_company(monkeypatch):
    monkeypatch.setattr(updates, "AT_ONCE_ON_CPU", 2 * 3 * 2 * 4)
    waiting, statistics, calls = Updates(), [Activity(2) for _ in range(4)], []
    places, accumulate = [[Part("key", Activity, statistic)] for statistic in statistics], Activity.accumulate
    monkeypatch.setattr(Activity, "accumulate", lambda self, x, ids: calls.append(x.shape[1]) or accumulate(self, x, ids))
    for n in (3, 1, 30):
        ids = torch.arange(n)
        for place in places:
            waiting.add(place, torch.ones(n, 2, 4), ids)
        waiting.flush()
    assert calls == [4] * 6
    assert [int(s.n_samples) for s in statistics] == [34] * 4


def test_what_is_got_ready_for_a_batch_lasts_until_the_next_whoever_asks_for_scores_meanwhile():
    """Room is given out anew only when a batch begins: between, what waited may be made at any time."""
    torch.manual_seed(0)
    waiting, later, alone = Updates(), Activity(2), Activity(2)
    place = [Part("key", Activity, later)]
    for _ in range(3):
        waiting.batch_ends()
        rooms = [waiting.arena.room((5, 2, 4), torch.float32) for _ in range(3)]
        for room in rooms:
            x = torch.randn(5, 2, 4).relu()
            waiting.add(place, room.copy_(x), torch.arange(5))
            alone.update(x, torch.arange(5))
            waiting.flush()
            later_room = waiting.arena.room((5, 2, 4), torch.float32)
            assert all(later_room.data_ptr() != one.data_ptr() for one in rooms)
    assert torch.equal(later.compute(), alone.compute())


def test_where_no_room_is_left_nobody_gets_any(monkeypatch):
    monkeypatch.setattr(updates, "HELD_ON_CPU", 10)
    arena = Updates().arena
    assert arena.room((2, 2, 2), torch.float32).shape == (2, 2, 2)
    assert arena.room((1, 1, 3), torch.float32) is None
    assert arena.room((1, 1, 3), torch.float64) is not None
    arena.clear()
    assert arena.room((1, 1, 10), torch.float32) is not None
