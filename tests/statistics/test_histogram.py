import numpy as np
import pytest
import scipy.stats
import torch

from actprune.core.errors import ConfigError
from actprune.statistics import Histogram, histogram


def filled(x, **options):
    statistic = Histogram(x.shape[1], **options)
    statistic.update(x, torch.arange(len(x)))
    return statistic


def test_every_value_is_counted_once():
    x = torch.randn(40, 6, 25, generator=torch.Generator().manual_seed(1)).relu()
    for options in ({}, {"range": "unit"}, {"zero_bin": False}):
        counts = filled(x, **options).compute()
        assert counts.sum(1).tolist() == [1000.0] * 6
        assert torch.equal(counts, counts.round())
        assert (counts >= 0).all()


def test_exact_zeros_have_their_own_bin_and_share_one_without_it():
    x = torch.tensor([0.0, -0.0, 1e-9, 1.0, 8.0, -8.0]).view(-1, 1, 1)
    own, shared = filled(x, bins=4).compute()[0], filled(x, bins=4, zero_bin=False).compute()[0]
    assert own.tolist() == [2, 1, 0, 2, 1]
    assert shared.tolist() == [1, 0, 4, 1]


@pytest.mark.parametrize("bins", [16, 64, 256])
@pytest.mark.parametrize("scale", [1e-4, 0.7, 1.0, 1000.0])
def test_bins_are_those_of_luo_and_wu_to_within_a_fine_bin(bins, scale):
    """Entropy against numpy's equal bins between min and max; the edges differ by at most 1/16 of a bin."""
    x = scale * torch.randn(2000, 1, 10, generator=torch.Generator().manual_seed(2))
    counts = filled(x, bins=bins, range="unit", zero_bin=False).compute()[0]
    reference, _ = np.histogram(x.double().numpy(), bins=bins)
    assert scipy.stats.entropy(counts.numpy()) == pytest.approx(scipy.stats.entropy(reference), abs=0.03)
    assert np.abs(counts.numpy().cumsum() - reference.cumsum()).max() <= 20_000 * 0.4 * 8.5 / bins / 8


def test_a_range_per_unit_is_blind_to_scale_and_offset():
    base = torch.randint(0, 4096, (500, 1, 1), generator=torch.Generator().manual_seed(3)).float() / 4096
    x = torch.cat([base, 2**-20 * base, 1024 * base, base + 8, -base], dim=1)
    counts = filled(x, bins=32, range="unit", zero_bin=False).compute()
    for unit in (1, 2, 3):
        assert torch.equal(counts[unit], counts[0])
    assert torch.allclose(torch.special.entr(counts / 500).sum(1), torch.special.entr(counts[:1] / 500).sum(1), atol=0.02)


def test_a_common_range_keeps_the_scale():
    x = torch.randn(500, 1, 8, generator=torch.Generator().manual_seed(4)) * torch.tensor([0.01, 0.1, 1.0])[:, None]
    filled_bins = (filled(x, bins=64).compute() > 0).sum(1)
    assert filled_bins[0] < filled_bins[1] < filled_bins[2]


@pytest.mark.parametrize("value", [0.0, 1.0, -3.7, 1e-30, 3e38])
@pytest.mark.parametrize("range", ["layer", "unit"])
def test_a_constant_unit_fills_one_bin(value, range):
    counts = filled(torch.full((9, 2, 4), value), range=range).compute()
    assert (counts > 0).sum(1).tolist() == [1, 1]
    assert counts.sum(1).tolist() == [36, 36]


def test_rounding_noise_of_a_constant_is_no_variation():
    x = 5 * (1 + 1e-6 * torch.randn(50, 1, 8, generator=torch.Generator().manual_seed(5)))
    assert (filled(x + 0.01, range="unit").compute() > 0).sum() == 1


def test_at_least_counts_the_values_from_every_edge_upwards():
    x = torch.randn(30, 3, 5, generator=torch.Generator().manual_seed(6)).relu()
    x[:, 2] -= 0.5
    sizes = filled(x, bins=4, range="unit").at_least()
    assert sizes.shape == (3, 65)
    assert sizes[:, 0].tolist() == [150.0] * 3
    for unit in range(3):
        values = x[:, unit].flatten()
        assert int((values > 0).sum()) in sizes[unit].tolist()
        assert sizes[unit, -1] == (values > 0).sum() or not (values == 0).any()
    assert torch.equal(filled(x, bins=4, range="unit", zero_bin=False).at_least(), sizes[:, :-1])


def test_many_units_are_counted_in_blocks(monkeypatch):
    x = torch.randn(20, 11, 3, generator=torch.Generator().manual_seed(7))
    whole = [filled(x, bins=4, range=scope).counts for scope in ("layer", "unit")]
    monkeypatch.setattr(histogram, "_EXACT_FLOAT32", 2 * 64 * 4)  # four units at once
    assert torch.equal(filled(x, bins=4, range="layer").counts, whole[0])
    assert torch.equal(filled(x, bins=4, range="unit").counts, whole[1])


def test_pooled_maps_must_not_be_sampled():
    assert Histogram(3, pool="gap").whole_maps
    assert not Histogram(3).whole_maps


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bins": 1}, r"bins=1 must be an integer in \[2, 65536\]"),
        ({"bins": 70_000}, r"bins=70000 must be an integer in"),
        ({"range": "model"}, "range='model' is not known; choose one of layer, unit"),
        ({"pool": "max"}, "pool='max' is not known; choose one of positions, gap"),
    ],
)
def test_nonsense_is_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        Histogram(3, **options)
