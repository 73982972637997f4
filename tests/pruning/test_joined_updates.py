"""Updates are joined where that changes nothing, and only there."""

from functools import partial

import pytest
import torch
from torch import nn

from actprune import Budget, Pruner
from actprune.compensation import LeastSquares, Mean
from actprune.core.errors import ObservationError
from actprune.core.views import Criterion
from actprune.criteria import Entropy, Reconstruction
from actprune.pruning.updates import Part, Updates
from actprune.statistics import Accumulator, Activity, Histogram, LinearRademacher, Moments


def test_reconstruction_sees_variances_over_positions_with_either_compensation():
    """Unit 0 varies inside its maps and not between them; unit 1 hardly varies at all and has to leave."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 2, 1, bias=False), nn.Conv2d(2, 4, 1)).eval()
    with torch.no_grad():
        model[0].weight.copy_(torch.eye(2).view(2, 2, 1, 1))
        model[1].weight.fill_(1.0)
    x = torch.randn(64, 2, 16, 16)
    x[:, 0] -= x[:, 0].mean((1, 2), keepdim=True)
    x[:, 1] = 0.1 * torch.randn(64, 1, 1)
    for compensation in (Mean(), LeastSquares()):
        pruner = Pruner(model, x[:1], Reconstruction(), Budget(params=0.9), compensation=compensation)
        with pruner.observe() as observation, torch.no_grad():
            observation.begin_batch(torch.arange(64))
            model(x)
        assert pruner.plan(observation).removed["0.weight"] == {0: [1]}


def test_statistics_with_other_settings_are_not_joined():
    torch.manual_seed(0)
    made = [Histogram(4, bins=8), Histogram(4, bins=8, zero_bin=False), Histogram(4, bins=8), Histogram(4, bins=16)]
    alone = [Histogram(4, bins=8), Histogram(4, bins=8, zero_bin=False), Histogram(4, bins=8), Histogram(4, bins=16)]
    places, updates = [[Part("histogram", lambda n: Histogram(n, bins=8), one)] for one in made], Updates()
    for _ in range(3):
        ids = torch.arange(6)
        for place, other in zip(places, alone, strict=True):
            x = torch.randn(6, 4, 5).relu()
            updates.add(place, x, ids)
            other.update(x, ids)
        updates.flush()
    for one, other in zip(made, alone, strict=True):
        torch.testing.assert_close(one.compute(), other.compute(), rtol=0, atol=0)


def test_a_statistic_that_is_read_twice_in_a_batch_counts_twice():
    torch.manual_seed(0)
    made, alone, updates = [Histogram(3, bins=8) for _ in range(3)], [Histogram(3, bins=8) for _ in range(3)], Updates()
    places = [[Part("histogram", lambda n: Histogram(n, bins=8), one)] for one in made]
    for batch in range(3):
        ids = torch.arange(4) + 4 * batch
        for number in (0, 1, 1, 2):
            x = torch.randn(4, 3, 2)
            updates.add(places[number], x, ids)
            alone[number].update(x, ids)
        updates.flush()
    for one, other in zip(made, alone, strict=True):
        torch.testing.assert_close(one.compute(), other.compute(), rtol=0, atol=0)


@pytest.mark.parametrize("held", [1, 200, 1 << 23])
def test_batches_that_waited_for_each_other_give_what_each_would_have_given(monkeypatch, held):
    monkeypatch.setattr("actprune.pruning.updates.HELD_ON_CPU", held)
    torch.manual_seed(0)
    kinds = {"histogram": lambda n: Histogram(n, bins=8), "rademacher": partial(LinearRademacher, pool="positions")}
    made, alone = ({key: [make(3) for _ in range(3)] for key, make in kinds.items()} for _ in range(2))
    places = [[Part(key, kinds[key], made[key][number]) for key in kinds] for number in range(3)]
    updates, first = Updates(), 0
    for size in (4, 7, 1, 4, 4):
        ids = torch.arange(first, first + size)
        first += size
        for number in (0, 1, 2):
            x = torch.randn(size, 3, 2).relu()
            updates.add(places[number], x, ids)
            for key in kinds:
                alone[key][number].update(x, ids)
        updates.batch_ends()
    updates.flush()
    for key in kinds:
        for one, other in zip(made[key], alone[key], strict=True):
            torch.testing.assert_close(one.compute(), other.compute(), rtol=1e-12, atol=0)


@pytest.mark.parametrize("kind", [Activity, Moments, Histogram, LinearRademacher])
def test_of_batches_that_waited_the_one_that_was_not_finite_is_named(kind):
    made, updates = [kind(3) for _ in range(3)], Updates()
    places = [[Part("one", kind, statistic)] for statistic in made]
    for batch in range(5):
        ids = torch.arange(4) + 4 * batch
        for number in (0, 1, 2):
            x = torch.randn(4, 3, 2)
            if batch in (2, 4) and number == 1:
                x[3, 0, 1] = torch.nan if batch == 2 else torch.inf
            updates.add(places[number], x, ids)
        updates.batch_ends()
    updates.flush()
    for number in (0, 2):
        made[number].check()
    with pytest.raises(ObservationError, match=r"1 of 3 units had NaN or Inf activations, .* first in batch 2"):
        made[1].check()


def test_what_was_counted_before_an_error_is_not_counted_again(monkeypatch):
    x, ids, updates = torch.randn(4, 3, 2), torch.arange(4), Updates()
    statistics = [Moments(3), Activity(3), Histogram(3)]
    places = [[Part(key, type(statistic), statistic)] for key, statistic in zip("abc", statistics, strict=True)]
    for place in places:
        updates.add(place, x.clone(), ids)
    updates.batch_ends()
    broken = statistics[1]

    def fails(*_args, **_kwargs):
        raise MemoryError("no room")

    monkeypatch.setattr(broken, "update", fails)
    with pytest.raises(MemoryError):
        updates.flush()
    updates.flush()
    assert [int(s.n_samples) for s in statistics if s is not broken] == [4, 4]


class _Own(Accumulator):
    """A statistic of somebody else's: what it keeps besides its states says how, and is its own."""

    joinable = True

    def __init__(self, n_units, keeps):
        super().__init__(n_units)
        self.add_state("total", torch.zeros(n_units, dtype=torch.float64), dist_reduce_fx="sum")
        self.keeps = keeps
        if keeps == "width":
            self.width = n_units
        elif keeps == "preset":
            self.total += 5
        elif keeps == "buffer":
            self.register_buffer("sums", torch.zeros(n_units, dtype=torch.float64))
        elif keeps in ("tensor", "list"):
            self.sums = torch.zeros(n_units, dtype=torch.float64) if keeps == "tensor" else [0.0]

    def accumulate(self, x, sample_ids):
        sums = x.double().sum((0, 2))
        if self.keeps == "width":
            sums = sums.view(self.width)
        elif self.keeps in ("buffer", "tensor"):
            self.sums += sums
            sums = self.sums
        elif self.keeps == "list":
            self.sums.append(sums.sum().item())
            sums = sums + sum(self.sums)
        self.total += sums
        return sums

    def evaluate(self):
        return self.total


@pytest.mark.parametrize("keeps", ["width", "preset", "buffer", "tensor", "list"])
def test_what_a_statistic_keeps_besides_its_states_is_not_shared(keeps):
    class Sums(Criterion):
        def statistics(self):
            return {"sums": partial(_Own, keeps=keeps)}

        def score(self, view):
            return view.statistics["sums"][0].compute()

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2)).eval()
    x, ids = torch.randn(5, 3), torch.arange(5)
    pruner = Pruner(model, x, Sums(), Budget(params=0.5))
    with torch.no_grad(), pruner.observe() as observation:
        observation.begin_batch(ids)
        model(x)
    found = [sites[0] for by_key in observation.scores.values() for sites in by_key.values()]
    assert len(found) == 3
    for depth, statistic in enumerate(found, 1):
        alone = _Own(4, keeps)
        alone.update(model[:depth](x).detach().unsqueeze(2), ids)
        torch.testing.assert_close(statistic.compute(), alone.compute(), rtol=1e-6, atol=1e-6)


def test_all_places_of_a_kind_are_counted_with_one_call(monkeypatch):
    """What compensation accumulates, too."""
    layers = [layer for _ in range(6) for layer in (nn.Conv2d(4, 4, 3, padding=1), nn.ReLU())]
    model, x = nn.Sequential(*layers, nn.Conv2d(4, 2, 1)).eval(), torch.rand(3, 4, 6, 6)
    calls = []
    for kind in (Histogram, Moments):
        count = partial(lambda how, self, *args: calls.append((type(self), self.n_units)) or how(self, *args), kind.accumulate)
        monkeypatch.setattr(kind, "accumulate", lambda self, *args, count=count: count(self, *args))
    pruner = Pruner(model, x, Entropy(), Budget(params=0.9), compensation=Mean())
    with pruner.observe() as observation, torch.no_grad():
        for batch in range(3):
            observation.begin_batch(torch.arange(3) + 3 * batch)
            model(x)
    assert sorted(calls, key=str) == [(Histogram, 24), (Moments, 24)]
