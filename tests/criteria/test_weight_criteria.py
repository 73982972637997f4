import hashlib
import math

import pytest
import scipy.stats
import torch

from actprune.core.errors import ConfigError
from actprune.core.views import GroupView
from actprune.criteria import FPGM, Magnitude, Random, ZeroUnits

MASK = (1 << 64) - 1


def splitmix(x):
    z = (x + 0x9E3779B97F4A7C15) & MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
    return z ^ (z >> 31)


def test_random_is_a_function_of_seed_name_and_unit():
    for name, seed in (("layer1.0.conv1", 0), ("fc", 3), ("fc", 2**40)):
        key = int.from_bytes(hashlib.blake2b(name.encode(), digest_size=7).digest(), "big")
        expected = [(splitmix(splitmix(splitmix(seed) ^ key) ^ unit) >> 11) / 2**53 for unit in range(10)]
        assert Random().score(GroupView(name, 10, seed=seed)).tolist() == expected


def test_random_is_uniform():
    drawn = torch.cat([Random().score(GroupView(f"layer{i}", 100)) for i in range(50)])
    assert scipy.stats.kstest(drawn, "uniform").pvalue > 0.01


def test_magnitude_counts_every_slice_and_needs_no_gradient():
    weight = torch.nn.Parameter(torch.tensor([[3.0, 0.0], [1.0, -1.0]]))
    view = GroupView("fc", 2, slices=lambda: [weight, torch.tensor([[4.0], [0.0]])])
    assert Magnitude().score(view).tolist() == pytest.approx([5.0, 2**0.5])
    assert Magnitude(p=1).score(view).tolist() == [7.0, 2.0]
    half = GroupView("fc", 2, slices=lambda: [weight.half() * 1e4])
    assert Magnitude().score(half).tolist() == pytest.approx([3e4, 2e4**0.5 * 1e2])


@pytest.mark.parametrize("p", [0, 3, "l1"])
def test_magnitude_refuses_other_norms(p):
    with pytest.raises(ConfigError, match=f"p={p!r} must be 1 or 2"):
        Magnitude(p=p)


def test_twins_in_the_middle_leave_first_with_fpgm():
    weight = torch.tensor([[0.0, 0.0], [0.0, 0.0], [10.0, 0.0], [0.0, 10.0], [-10.0, 0.0], [0.0, -10.0]])
    score = FPGM().score(GroupView("conv", 6, slices=lambda: [weight + 1e4]))
    assert score[:2].tolist() == pytest.approx([40, 40], abs=1e-6)
    assert score[2:].tolist() == pytest.approx([40 + 20 * 2**0.5] * 4, abs=1e-6)


@pytest.mark.parametrize("threshold", [-0.1, math.inf, math.nan])
def test_zero_units_refuses_thresholds_that_make_no_sense(threshold):
    with pytest.raises(ConfigError, match=r"threshold=.* must be a finite number of at least 0"):
        ZeroUnits(threshold)


def test_zero_units_has_no_score_where_units_own_nothing():
    assert ZeroUnits().score(GroupView("stream", 3)) is None
