import itertools
import math

import pytest
import scipy.stats
import torch

from actprune.core.errors import ConfigError
from actprune.core.views import GroupView
from actprune.criteria import RMS, Rademacher
from actprune.criteria.rademacher import leave_one_out
from actprune.criteria.walks import sup_of_walks, threshold_complexity


def every_sign(n):
    return torch.tensor(list(itertools.product((-1.0, 1.0), repeat=n)), dtype=torch.float64)


def score(criterion, x, ids=None):
    ((key, build),) = criterion.statistics().items()
    statistic = build(x.shape[1])
    statistic.update(x, torch.arange(len(x)) if ids is None else ids)
    return criterion.score(GroupView("g", x.shape[1], {key: [statistic]}))


def test_layer_class_on_all_signs():
    a = torch.tensor([[1.0, 0, 2], [2, 1, 0], [0, 3, 1], [1, 1, 1]], dtype=torch.float64)
    sums = every_sign(4) @ a
    assert (sums.norm(dim=1).mean() / 4).item() == pytest.approx(1.15161822, abs=1e-8)
    shares = leave_one_out(sums.square()).mean(0) / 4
    for unit in range(3):
        without = sums[:, [u for u in range(3) if u != unit]].norm(dim=1)
        assert shares[unit].item() == pytest.approx((sums.norm(dim=1) - without).mean().item() / 4, abs=1e-12)


def test_leave_one_out_keeps_tiny_shares_and_zeros():
    shares = leave_one_out(torch.tensor([[1.0, 1e-30, 0.0], [0.0, 0.0, 0.0]], dtype=torch.float64))
    assert shares[0].tolist() == pytest.approx([1.0, 5e-31, 0.0], rel=1e-9)
    assert shares[1].tolist() == [0, 0, 0]


@pytest.mark.parametrize(("a", "expected"), [((1, 2, 3, 4), 0.296875), ((0, 0, 1, 2), 0.265625), ((0, 0, 0, 5), 0.25)])
def test_threshold_class_with_the_empty_set_on_all_signs(a, expected):
    sizes = torch.tensor([[sum(v >= t for v in a) for t in sorted(set(a))]])
    walks = torch.nn.functional.pad(every_sign(4).cumsum(1), (1, 0))
    assert sup_of_walks(walks, sizes, symmetric=False).mean().item() / 4 == expected
    drawn = threshold_complexity(sizes.double(), 4, replicates=4000, seed=0, symmetric=False).item()
    assert drawn == pytest.approx(expected, abs=5 * 0.25 / math.sqrt(4000))


CURVE = [(0, 1.253), (0.25, 1.135), (0.5, 1.053), (0.75, 0.920), (0.9, 0.872), (0.99, 0.806)]


@pytest.mark.parametrize(
    ("n", "zero_mass", "expected"), [*((2000, *point) for point in CURVE), (200_000, *CURVE[0]), (200_000, *CURVE[3])]
)
def test_threshold_class_is_lower_for_units_that_are_mostly_zero(n, zero_mass, expected):
    """sqrt(n) R against the published curve; long walks are drawn in coarser steps."""
    positive = round(n * (1 - zero_mass))
    sizes = torch.cat([torch.linspace(0, positive, 1500).round(), torch.tensor([float(n)])]).double().unsqueeze(0)
    drawn = threshold_complexity(sizes, n, replicates=500, seed=3).item() * math.sqrt(n)
    assert drawn == pytest.approx(expected, abs=0.08)


def test_threshold_class_sees_neither_scale_nor_offset():
    base = torch.randint(0, 64, (300, 1, 1), generator=torch.Generator().manual_seed(0)).float() / 64
    x = torch.cat([base, 1e4 * base, base + 5, base**3], dim=1)
    scores = score(Rademacher("threshold"), x)
    assert scores[1].item() == pytest.approx(scores[0].item(), abs=1e-12)
    assert scores[2].item() == pytest.approx(scores[0].item(), abs=1e-12)
    assert scores[3].item() == pytest.approx(scores[0].item(), rel=0.1)


def test_linear_class_over_positions_ranks_as_the_root_mean_square():
    scales = torch.linspace(0.2, 3, 30)
    x = torch.randn(300, 30, 2, generator=torch.Generator().manual_seed(1)).relu() * scales[:, None]
    rms = score(RMS(), x)
    closed = score(Rademacher(estimate="closed_form", pool="positions"), x)
    torch.testing.assert_close(closed, rms / math.sqrt(600), rtol=1e-6, atol=0)
    drawn = score(Rademacher(pool="positions", estimate="monte_carlo"), x)
    assert scipy.stats.spearmanr(drawn, rms).statistic > 0.95


def test_signs_follow_the_sample_and_the_seed():
    x = torch.randn(50, 3, 4, generator=torch.Generator().manual_seed(2))
    order = torch.randperm(50, generator=torch.Generator().manual_seed(3))
    drawn = Rademacher(estimate="monte_carlo")
    plain = score(drawn, x)
    torch.testing.assert_close(score(drawn, x[order], order), plain, rtol=1e-12, atol=0)
    assert not torch.allclose(score(drawn, x, torch.arange(50) + 1000), plain, rtol=1e-3)
    assert not torch.allclose(score(Rademacher(estimate="monte_carlo", seed=1), x), plain, rtol=1e-3)


def test_the_closed_form_is_the_default_where_there_is_one():
    x = torch.randn(50, 3, 4, generator=torch.Generator().manual_seed(2))
    for name in ("linear", "layer"):
        assert torch.equal(score(Rademacher(name), x), score(Rademacher(name, "closed_form"), x))
        assert not torch.equal(score(Rademacher(name), x), score(Rademacher(name, "monte_carlo"), x))
    assert torch.equal(score(Rademacher("threshold"), x), score(Rademacher("threshold", "monte_carlo"), x))


@pytest.mark.parametrize("replicates", [16, 64, 256])
def test_the_relative_error_of_replicates_is_what_messages_say(replicates):
    """100 draws of one unit over many alike samples."""
    x = torch.randn(400, 1, 1, generator=torch.Generator().manual_seed(4))
    drawn = torch.cat([score(Rademacher("linear", "monte_carlo", "gap", replicates, seed), x) for seed in range(100)])
    assert (drawn.std() / drawn.mean()).item() == pytest.approx(0.76 / math.sqrt(replicates), rel=0.25)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"function_class": "deep"}, "function_class='deep' is not known; choose one of linear, threshold, layer"),
        ({"estimate": "exact"}, "estimate='exact' is not known; choose one of monte_carlo, closed_form"),
        ({"function_class": "threshold", "estimate": "closed_form"}, "'threshold' has no closed form; set estimate"),
        ({"replicates": 0}, r"replicates=0 must be an integer of 1 or more; the relative error is 0.76 / sqrt\(replicates\)"),
        ({"replicates": 2.5}, r"replicates=2.5 must be an integer of 1 or more"),
        ({"seed": 1.5}, r"seed=1.5 must be an integer"),
        ({"pool": "max"}, "pool='max' is not known"),
    ],
)
def test_nonsense_is_refused_at_once(options, message):
    with pytest.raises(ConfigError, match=message):
        Rademacher(**options)
