import math

import pytest
import scipy.stats
import torch

from actprune.core.ranks import ranks, spearman


@pytest.mark.parametrize("levels", [2, 5, 1000])
def test_ties_share_their_mean_rank(levels):
    x = torch.randint(0, levels, (40,), generator=torch.Generator().manual_seed(levels)).double()
    assert ranks(x).tolist() == (scipy.stats.rankdata(x) - 1).tolist()


@pytest.mark.parametrize("seed", range(4))
def test_spearman_is_that_of_scipy(seed):
    generator = torch.Generator().manual_seed(seed)
    a, b = torch.randn(25, generator=generator).round(decimals=1), torch.randn(25, generator=generator)
    b = b + seed * a
    assert spearman(a, b) == pytest.approx(scipy.stats.spearmanr(a, b).statistic, abs=1e-12)


def test_monotone_changes_do_not_matter_and_a_constant_has_no_rank():
    a = torch.tensor([3.0, -1.0, 2.0, 8.0])
    assert spearman(a, a.exp()) == 1
    assert spearman(a, -a) == -1
    assert math.isnan(spearman(a, torch.ones(4)))
