import itertools
from fractions import Fraction

import pytest
import torch

from actprune.statistics.dyadic import MIN_EXPONENT, RELATIVE_BITS, bin_index, columns, power_of_two, rebin, window

EDGES = [-3e38, -1e4, -257.0, -1.0, -0.3, -1e-20, -1e-40, 0.0, 1e-45, 1e-7, 0.3, 0.999, 1.0, 1.001, 256.0, 1e4, 3e38]


def test_powers_of_two_are_exact():
    exponents = torch.arange(-1022, 1024)
    assert power_of_two(exponents).tolist() == [2.0**e for e in range(-1022, 1024)]


@pytest.mark.parametrize("n_bins", [32, 48, 1024])
def test_window_is_the_smallest_that_holds_the_range(n_bins):
    for low, high in itertools.combinations_with_replacement(EDGES, 2):
        low, high = (float(torch.tensor(v, dtype=torch.float32)) for v in (low, high))
        exponent, origin = (int(v) for v in window(torch.tensor([low]).double(), torch.tensor([high]).double(), n_bins))

        def touched(e, low=low, high=high):
            return Fraction(high) // Fraction(2) ** e - Fraction(low) // Fraction(2) ** e + 1

        assert origin == Fraction(low) // Fraction(2) ** exponent
        assert touched(exponent) <= n_bins
        magnitude = max(abs(low), abs(high))
        assert (
            exponent == MIN_EXPONENT
            or touched(exponent - 1) > n_bins
            or magnitude >= Fraction(2) ** (exponent - 1 + RELATIVE_BITS)
        )


@pytest.mark.parametrize("n_bins", [32, 48])
def test_exponent_never_falls_as_the_range_grows(n_bins):
    ranges = list(itertools.combinations_with_replacement(EDGES, 2))
    exponents = window(*torch.tensor(ranges, dtype=torch.float64).T, n_bins)[0].tolist()
    for (inner, small), (outer, large) in itertools.product(zip(ranges, exponents, strict=True), repeat=2):
        if outer[0] <= inner[0] and inner[1] <= outer[1]:
            assert small <= large


def test_rebinning_equals_binning_at_the_end():
    generator = torch.Generator().manual_seed(0)
    own = torch.zeros(3, dtype=torch.int64)
    n_bins, low, high = 32, torch.full((3,), torch.inf).double(), torch.full((3,), -torch.inf).double()
    counts, seen = torch.zeros(3, n_bins, dtype=torch.int64), []
    for scale in (1e-3, 1e-3, 0.2, 5.0, 4.0, 900.0):
        x = torch.randn(50, 3, 1, generator=generator) * scale + torch.tensor([[0.0], [7.0], [-1e3]])
        seen.append(x)
        old = window(low, high, n_bins)
        low, high = torch.minimum(low, x.amin((0, 2)).double()), torch.maximum(high, x.amax((0, 2)).double())
        new = window(low, high, n_bins)
        counts = rebin(counts, old, new)
        for unit in range(3):
            counts[unit] += torch.bincount(bin_index(x[:, :, 0], *columns(*new, own, 1))[:, unit], minlength=n_bins)
        everything = bin_index(torch.cat(seen)[:, :, 0], *columns(*new, own, 1))
        assert torch.equal(counts, torch.stack([torch.bincount(column, minlength=n_bins) for column in everything.T]))


def test_values_below_zero_are_not_rounded_into_the_bin_above():
    """-1e-10 lies in bin -1; floor after subtracting the origin in float32 would put it into bin 0."""
    x = torch.tensor([-1e-10, 0.0, 1e-10]).view(3, 1)
    exponent, origin = window(torch.tensor([-1.0]).double(), torch.tensor([0.9]).double(), 64)
    assert bin_index(x, *columns(exponent, origin, torch.tensor([0]), 1)).flatten().tolist() == [-origin - 1, -origin, -origin]
