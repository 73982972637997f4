import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from actprune.core.errors import ConfigError
from actprune.statistics import position_bits, sample_positions
from actprune.statistics.counter import below, hashed, signs, splitmix64, uniform


def test_splitmix64_gives_the_published_sequence():
    """The first three outputs of the reference implementation for seed 1234567 (state += gamma between them)."""
    gamma = 0x9E3779B97F4A7C15
    states = [(1234567 + i * gamma) % 2**64 for i in range(3)]
    signed = torch.tensor([s - 2**64 if s >= 2**63 else s for s in states])
    out = [int(v) % 2**64 for v in splitmix64(signed)]
    assert out == [6457827717110365317, 3203168211198807973, 9817491932198370423]


def test_every_key_and_their_order_matter():
    a, b = torch.arange(50), torch.arange(50)
    grid = torch.cat([hashed(seed, a.unsqueeze(1), b).flatten() for seed in (0, 1, -1, 2**63)])
    assert len(grid.unique()) == 4 * 50 * 50


def test_uniform_is_uniform_and_below_one():
    values = uniform(3, torch.arange(20_000))
    assert values.dtype == torch.float64
    assert values.min() >= 0
    assert values.max() < 1
    steps = torch.arange(1, 20_001) / 20_000
    assert (values.sort().values - steps).abs().max() < 1.63 / math.sqrt(20_000)  # Kolmogorov-Smirnov at 1 %


def test_below_reaches_every_number_equally():
    drawn = torch.bincount(below(7, hashed(5, torch.arange(70_000))), minlength=8)
    assert drawn[7] == 0
    assert (drawn[:7] - 10_000).abs().max() < 500


def test_signs_are_fair_and_independent():
    sigma = signs(torch.arange(4096), 130, 0, torch.float64)
    assert sigma.shape == (4096, 130)
    assert torch.equal(sigma.abs(), torch.ones_like(sigma))
    gram = sigma.T @ sigma / 4096
    assert (gram - torch.eye(130)).abs().max() < 5.5 / 64  # replicates among each other, 8385 pairs
    assert sigma.mean(0).abs().max() < 4.5 / 64
    assert (sigma[1:] * sigma[:-1]).mean().abs() < 4.5 / math.sqrt(4095 * 130)  # neighbours in sample id


def test_signs_of_a_sample_depend_on_its_key_only():
    whole = signs(torch.arange(10), 70, 4, torch.float32)
    assert torch.equal(signs(torch.tensor([7, 2]), 70, 4, torch.float32), whole[[7, 2]])
    assert torch.equal(signs(torch.arange(10), 3, 4, torch.float32), whole[:, :3])
    assert not torch.equal(signs(torch.arange(10), 70, 5, torch.float32), whole)


@pytest.mark.parametrize("replicates", [1, 20, 64, 130])
def test_no_more_signs_are_made_than_are_asked_for_but_in_the_last_word(replicates):
    class Largest(TorchDispatchMode):
        elements = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            self.elements = max([self.elements, *(x.numel() for x in tree_leaves(out) if isinstance(x, torch.Tensor))])
            return out

    with Largest() as largest:
        signs(torch.arange(1000), replicates, 0, torch.float64)
    assert largest.elements <= 1000 * (replicates if replicates <= 64 else -(-replicates // 64) * 64)


@pytest.mark.parametrize(("n", "k"), [(1024, 16), (49, 10), (10, 9), (7, 1), (1, 1)])
def test_positions_are_distinct_and_equally_likely(n, k):
    drawn = sample_positions(torch.arange(30_000), n, k, seed=1)
    assert drawn.shape == (30_000, k)
    assert drawn.dtype == torch.int64
    assert (drawn.sort(dim=1).values.diff(dim=1) > 0).all()
    assert drawn.min() >= 0
    assert drawn.max() < n
    counts = torch.bincount(drawn.flatten(), minlength=n)
    share = k / n
    assert (counts - 30_000 * share).abs().max() <= 4.8 * math.sqrt(30_000 * share * (1 - share))


def test_positions_of_a_sample_do_not_depend_on_its_batch():
    ids = torch.tensor([5, 900, 2**40, 0])
    whole = sample_positions(ids, 64, 9, seed=3)
    for order in ([2, 0], [3, 1, 0, 2]):
        assert torch.equal(sample_positions(ids[order], 64, 9, seed=3), whole[order])
    assert not torch.equal(sample_positions(ids, 64, 9, seed=4), whole)
    assert torch.equal(sample_positions(ids, 64, 9, seed=3, bits=position_bits(ids, 9, seed=3)), whole)


@pytest.mark.parametrize("k", [6, 7, 100])
def test_all_positions_when_there_are_no_more(k):
    assert torch.equal(sample_positions(torch.arange(3), 6, k, seed=0), torch.arange(6).expand(3, 6))


@pytest.mark.parametrize(("n", "k"), [(0, 3), (3, 0)])
def test_no_positions_raise(n, k):
    with pytest.raises(ConfigError, match=f"got k={k}, n_positions={n}"):
        sample_positions(torch.arange(3), n, k, seed=0)
