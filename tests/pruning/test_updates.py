"""Updates that wait for their likes: nothing is lost or doubled, whatever comes in whatever order."""

import pytest
import torch

from actprune.pruning import updates
from actprune.pruning.updates import Updates
from actprune.statistics import Activity, Histogram, MapRank


@pytest.mark.parametrize("at_once", [1, 100, 10**9])
@pytest.mark.parametrize("make", [Activity, Histogram, MapRank])
def test_every_company_of_sites_gives_the_same(at_once, make, monkeypatch):
    """Sites in another order, one that is missing, one that comes twice, and maps of another size."""
    monkeypatch.setattr(updates, "AT_ONCE_ON_CPU", at_once)
    torch.manual_seed(0)
    sizes, waiting = [2, 4, 3], Updates()
    later, alone = ([make(size) for size in sizes] for _ in range(2))
    for number, order in enumerate([[0, 1, 2], [0, 1, 2], [2, 0, 1], [0, 2], [1, 1, 0], [0, 1, 2]]):
        ids = torch.arange(5) + 5 * number
        for site in order:
            x = torch.randn(5, sizes[site], 9 if number < 5 else 4).relu()
            waiting.add("key", make, later[site], x, ids)
            alone[site].update(x, ids)
        if number != 1:  # the next batch's ids keep it apart all the same
            waiting.flush()
    for a, b in zip(later, alone, strict=True):
        assert torch.equal(a.compute(), b.compute())
        assert a.n_samples == b.n_samples


def test_the_batch_of_a_nan_is_named_whether_it_was_joined_or_not():
    waiting, statistics = Updates(), [Activity(2), Activity(2)]
    for number, order in enumerate([[0, 1], [0, 1], [1]]):
        for site in order:
            x = torch.full((3, 2, 4), torch.nan if number == 2 else 1.0)
            waiting.add("key", Activity, statistics[site], x, torch.arange(3))
        waiting.flush()
    assert statistics[1].first_nonfinite.tolist() == [2.0, 2.0]
    assert statistics[0].first_nonfinite.isinf().all()


def test_batches_of_another_size_come_in_the_same_company(monkeypatch):
    monkeypatch.setattr(updates, "AT_ONCE_ON_CPU", 2 * 3 * 2 * 4)
    waiting, statistics, calls = Updates(), [Activity(2) for _ in range(4)], []
    accumulate = Activity.accumulate
    monkeypatch.setattr(Activity, "accumulate", lambda self, x, ids: calls.append(x.shape[1]) or accumulate(self, x, ids))
    for n in (3, 1, 30):
        ids = torch.arange(n)
        for statistic in statistics:
            waiting.add("key", Activity, statistic, torch.ones(n, 2, 4), ids)
        waiting.flush()
    assert calls == [4] * 6
    assert [int(s.n_samples) for s in statistics] == [34] * 4
