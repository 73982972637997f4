"""Bounds of the empirical Rademacher complexity of networks with constrained layers (Graf et al. 2022, theorem 3.5).

With C_i = (4 / gamma) (||X|| / sqrt(n)) (what surrounds layer i) b_i, in a chain (prod s) b_i / s_i:

    norms:   4 / n + (12 H_{n-1} / sqrt(n)) sqrt(log 2W) (sum_i ceil(C_i^(2/3)))^(3/2)                W = max_i W_i
    params:  (12 / sqrt(n)) sqrt(sum_i 2 W_i (log(1 + m_i) + psi(m_i))),   m_i = ceil(L^2 C_i^2)
             psi(m) = zeta(3/2, 1)^(1/3) zeta(3/2, 1 + 1/m)^(2/3),  psi(0) = 0,  psi < 2.62

psi follows from Abel summation of the entropy integral and Hoelder's inequality. The layers that count are those that have
moved: one that is frozen (b = 0) adds nothing. ``rkwitt/excess_capacity`` computes both in other ways than its own statement of
the theorem: log n for the larger H_{n-1}, no ceilings, and psi with 1 / x^2 and without the exponent 2/3 (up to 3.6, above the
2.7 that it must stay under); its strided and overlapping max pools count as 1-Lipschitz, a 3x3 pool of stride 2 has constant 2.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from actprune.capacity.measure import NetworkCapacity
from actprune.core.calling import device_of, evaluating
from actprune.core.errors import ConfigError, ObservationError


def _zeta(q: float) -> float:
    """zeta(3/2, q), of Hurwitz."""
    s, at = torch.tensor([1.5, q], dtype=torch.float64, device="cpu")
    return float(torch.special.zeta(s, at))


ZETA = _zeta(1.0)


@dataclass(frozen=True)
class Sample:
    """What the bounds need of the training set."""

    n: int
    """Number of samples."""
    norm: float
    """||X|| / sqrt(n): root mean square of the samples' Euclidean norms, as the network reads them."""
    margin: float
    """gamma: output of the right class minus the largest other, at the asked quantile of the samples."""
    accuracy: float
    """Share of samples with a margin above 0."""


def sample_of(model: nn.Module, batches: Iterable[Any], quantile: float) -> Sample:
    """Norms and margins of (images, labels) batches; the model's mode is as it was afterwards.

    Args:
        model: a classifier, images (N, ...) to outputs (N, classes).
        batches: of images and labels (N,).
        quantile: share of samples that may have a smaller margin; 0 is the smallest margin, the paper's choice.

    Raises:
        ConfigError: quantile is not in [0, 1).
        ObservationError: there are no samples, or an output is not finite.
    """
    if not 0 <= quantile < 1:
        raise ConfigError(f"quantile={quantile} must be in [0, 1); 0 is the smallest margin")
    squares, margins = [], []
    device = device_of(model)
    with evaluating(model), torch.no_grad():
        for images, labels in batches:
            squares.append(images.double().flatten(1).square().sum(1).cpu())
            margins.append(margin(model(images.to(device)), labels.to(device)).double().cpu())
    if not squares:
        raise ObservationError("there are no samples; capacity needs at least 1 training image")
    square, gamma = torch.cat(squares), torch.cat(margins)
    if not bool(gamma.isfinite().all()):
        raise ObservationError("an output of the network is NaN or infinite; capacity is that of a trained network")
    kth = float(gamma.quantile(quantile, interpolation="lower"))
    return Sample(len(square), math.sqrt(float(square.mean())), kth, float((gamma > 0).double().mean()))


def margin(outputs: Tensor, labels: Tensor) -> Tensor:
    """Output of the right class minus the largest other, (N,), from outputs (N, classes)."""
    right = outputs.gather(1, labels[:, None])
    others = outputs.scatter(1, labels[:, None], -torch.inf)
    return (right - others.amax(1, keepdim=True)).squeeze(1)


def layer_capacities(network: NetworkCapacity, sample: Sample) -> list[float]:
    """C_i of every layer; infinite for layers that moved where the margin is not positive."""
    if sample.margin <= 0:
        return [math.inf if layer.influence else 0.0 for layer in network.layers]
    return [4 / sample.margin * sample.norm * layer.influence for layer in network.layers]


def norms_bound(capacities: Iterable[float], n: int, largest: int) -> float:
    """The first bound, from C_i of every layer, n samples and W, the elements of the largest weight; inf where a C_i is.

    Raises:
        ConfigError: n or W is below 1.
    """
    _check(n, largest)
    terms = [c ** (2 / 3) for c in capacities]
    if not all(map(math.isfinite, terms)):
        return math.inf
    total = sum(math.ceil(term) for term in terms)
    return 4 / n + 12 * harmonic(n - 1) / math.sqrt(n) * math.sqrt(math.log(2 * largest)) * total**1.5


def params_bound(capacities: Iterable[float], n: int, params: Iterable[int]) -> float:
    """The second bound, from C_i and W_i of every layer and n samples; inf where a C_i is.

    Raises:
        ConfigError: n or a W_i is below 1.
    """
    pairs = list(zip(capacities, params, strict=True))
    _check(n, min((w for _, w in pairs), default=1))
    if not all(math.isfinite(c) for c, _ in pairs):
        return math.inf
    inner = 0.0
    for c, weights in pairs:
        covered = float(math.ceil((len(pairs) * c) ** 2)) if (len(pairs) * c) ** 2 < 2**53 else (len(pairs) * c) ** 2
        inner += 2 * weights * (math.log1p(covered) + psi(covered))
    return 12 / math.sqrt(n) * math.sqrt(inner)


def psi(m: float) -> float:
    """zeta(3/2, 1)^(1/3) zeta(3/2, 1 + 1/m)^(2/3), 0 at 0."""
    if m == 0:
        return 0.0
    return ZETA ** (1 / 3) * _zeta(1 + 1 / m) ** (2 / 3)


def harmonic(n: int) -> float:
    """1 + 1/2 + ... + 1/n."""
    return math.fsum(1 / k for k in range(1, n + 1))


def _check(n: int, params: int) -> None:
    if n < 1:
        raise ConfigError(f"n={n} must be at least 1 sample")
    if params < 1:
        raise ConfigError(f"a weight with {params} elements has no bound; every layer must have at least 1")
