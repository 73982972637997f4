import math

import numpy as np
import pytest
import torch
from scipy.special import zeta
from torch import nn

from actprune.capacity import (
    LayerCapacity,
    NetworkCapacity,
    Sample,
    layer_capacities,
    margin,
    norms_bound,
    params_bound,
    psi,
    sample_of,
)
from actprune.core.errors import ConfigError, ObservationError


def chain(*constants_and_distances):
    """Layers of a chain; 10 weights each."""
    constants = [s for s, _ in constants_and_distances]
    layers = [
        LayerCapacity(str(i), None, s, b, 10, math.prod(constants[:i]), math.prod(constants[i + 1 :]))
        for i, (s, b) in enumerate(constants_and_distances)
    ]
    return NetworkCapacity(tuple(layers), math.prod(constants))


def test_a_chain_by_hand():
    """prod s = 6; C_i = 4 / 0.5 * 2 * 6 * b / s: 16 * 6 * 1 / 2 = 48 and 16 * 6 * 0.5 / 3 = 16."""
    network = chain((2.0, 1.0), (3.0, 0.5))
    assert layer_capacities(network, Sample(100, 2.0, 0.5, 1.0)) == pytest.approx([48.0, 16.0])
    assert network.complexity == pytest.approx(6 * (0.5 ** (2 / 3) + (1 / 6) ** (2 / 3)) ** 1.5)
    assert network.distance == 1.5


def test_the_norms_bound_by_hand():
    """48^(2/3) = 13.2 and 16^(2/3) = 6.35, rounded up 14 and 7; H_3 = 11/6."""
    expected = 4 / 4 + 12 * (11 / 6) / 2 * math.sqrt(math.log(20)) * 21**1.5
    assert norms_bound([48.0, 16.0], 4, 10) == pytest.approx(expected)


def test_the_params_bound_by_hand():
    """L = 2: m = ceil(4 * 0.3^2) = 1 and ceil(4 * 1.1^2) = 5."""
    inner = 2 * 10 * (math.log(2) + psi(1)) + 2 * 7 * (math.log(6) + psi(5))
    assert params_bound([0.3, 1.1], 9, [10, 7]) == pytest.approx(4 * math.sqrt(inner))


def test_psi():
    for m in (1, 2, 10, 1000):
        assert psi(m) == pytest.approx(zeta(1.5) ** (1 / 3) * zeta(1.5, 1 + 1 / m) ** (2 / 3))
    assert psi(0) == 0
    assert 0 < psi(1) < psi(2) < psi(1e12) < 2.7


@pytest.mark.parametrize("m", [1, 3, 40])
def test_psi_covers_the_entropy_integral(m):
    """The integral over (0, 1] of log(1 + m ceil(1 / e^2)), which the theorem replaces by log(1 + m) + psi(m)."""
    k = np.arange(1, 2_000_000, dtype=np.float64)
    widths = 1 / np.sqrt(k) - 1 / np.sqrt(k + 1)  # of the e with ceil(1 / e^2) = k + 1
    integral = float((np.log1p(m * (k + 1)) * widths).sum())
    assert integral < math.log(1 + m) + psi(m)


def test_a_frozen_network_has_only_the_constant_terms():
    assert norms_bound([0.0, 0.0], 50, 10) == pytest.approx(4 / 50)
    assert params_bound([0.0, 0.0], 50, [10, 10]) == 0.0


def test_one_sample():
    assert norms_bound([1.0], 1, 10) == 4.0


def test_capacities_beyond_whole_numbers_of_floating_point():
    assert math.isfinite(params_bound([1e30], 10, [10]))
    assert math.isfinite(norms_bound([1e30], 10, 10))


def test_without_a_margin_there_is_no_bound():
    capacities = layer_capacities(chain((1.0, 1.0), (1.0, 0.0)), Sample(10, 1.0, 0.0, 0.5))
    assert capacities == [math.inf, 0.0]
    assert norms_bound(capacities, 10, 10) == math.inf
    assert params_bound(capacities, 10, [10, 10]) == math.inf


def test_margins():
    outputs = torch.tensor([[1.0, 3.0, 2.0], [5.0, 0.0, 1.0]])
    assert margin(outputs, torch.tensor([1, 2])).tolist() == [1.0, -4.0]


def test_a_sample():
    net = nn.Linear(2, 2)
    with torch.no_grad():
        net.weight.copy_(torch.eye(2))
        net.bias.zero_()
    net.train()
    images = torch.tensor([[3.0, 4.0], [1.0, 0.0], [0.0, 2.0]])
    batches = [(images[:2], torch.tensor([1, 0])), (images[2:], torch.tensor([0]))]
    sample = sample_of(net, batches, 0.0)
    assert sample.n == 3
    assert sample.norm == pytest.approx(math.sqrt((25 + 1 + 4) / 3))
    assert sample.margin == -2.0
    assert sample.accuracy == pytest.approx(2 / 3)
    assert sample_of(net, batches, 0.5).margin == 1.0
    assert net.training


def test_errors():
    net = nn.Linear(2, 2)
    with pytest.raises(ConfigError, match=r"quantile=1 must be in \[0, 1\)"):
        sample_of(net, [], 1)
    with pytest.raises(ObservationError, match="no samples"):
        sample_of(net, [], 0)
    with pytest.raises(ObservationError, match="NaN or infinite"):
        sample_of(net, [(torch.full((1, 2), torch.nan), torch.tensor([0]))], 0)
    with pytest.raises(ConfigError, match="n=0 must be at least 1 sample"):
        norms_bound([1.0], 0, 10)
    with pytest.raises(ConfigError, match="0 elements"):
        params_bound([1.0], 5, [0])
