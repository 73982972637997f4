import pytest
import torch

from actprune.core.views import GroupView
from actprune.criteria import RMS, combine


def test_one_site_is_returned_as_it_is():
    score = torch.tensor([0.3, -1.0, 2.0], dtype=torch.float64)
    assert combine([score]) is score


def test_known_values():
    a = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)  # scale 2
    b = torch.tensor([300.0, 0.0, 0.0], dtype=torch.float64)  # scale 100
    assert combine([a, b]).tolist() == pytest.approx([51 * 3, 51 * 1, 51 * 1.5])


def test_a_unit_that_matters_at_one_consumer_is_kept():
    quiet = torch.tensor([0.001, 0.001, 0.005, 0.001], dtype=torch.float64)
    loud = torch.tensor([100.0, 90.0, 80.0, 95.0], dtype=torch.float64)
    assert combine([quiet, loud]).argmax() == 2
    assert (quiet + loud).argmin() == 2  # what adding the raw scores would have removed first


def test_the_scale_of_a_site_does_not_change_the_ranking():
    generator = torch.Generator().manual_seed(0)
    sites = [torch.rand(20, generator=generator, dtype=torch.float64) for _ in range(3)]
    ranking = combine(sites).argsort()
    for factor in (1e-6, 1e6):
        assert torch.equal(combine([sites[0], factor * sites[1], sites[2]]).argsort(), ranking)
        torch.testing.assert_close(combine([factor * s for s in sites]), factor * combine(sites))


def test_alike_sites_give_the_score_of_one():
    score = torch.tensor([0.5, 1.5, 4.0], dtype=torch.float64)
    torch.testing.assert_close(combine([score, score, score]), score)


def test_order_of_sites_does_not_matter():
    generator = torch.Generator().manual_seed(1)
    sites = [torch.randn(9, generator=generator, dtype=torch.float64) for _ in range(3)]
    torch.testing.assert_close(combine(sites[::-1]), combine(sites))


def test_silent_sites_are_left_out():
    score, silent = torch.tensor([-2.0, 1.0], dtype=torch.float64), torch.zeros(2, dtype=torch.float64)
    torch.testing.assert_close(combine([silent, score]), score)
    assert combine([silent, silent]).tolist() == [0, 0]


def test_a_criterion_uses_it_over_the_sites_of_a_group():
    sites, scores = [], []
    for scale in (1.0, 100.0):
        x = scale * torch.randn(5, 4, 3, generator=torch.Generator().manual_seed(int(scale)))
        statistic = RMS().statistics()["moments"](4)
        statistic.update(x, torch.arange(5))
        sites.append(statistic)
        scores.append(x.double().square().mean((0, 2)).sqrt())
    torch.testing.assert_close(RMS().score(GroupView("g", 4, {"moments": sites})), combine(scores), rtol=1e-6, atol=0)
