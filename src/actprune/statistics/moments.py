"""Mean, variance and mean square of every unit's activations.

Formula: about a reference r (the first sample's mean), in float64: n, sum (a - r), sum (a - r)^2. Of large maps per sample
the mean m_i over its P positions and the centred sum of squares M_i in float32 first, then the sums of P (m_i - r) and of
M_i + P (m_i - r)^2.
Source: Chan, Golub & LeVeque 1983 (pairwise merging). Each sample's share is a function of that sample alone, so the
result does not depend on batches; data offset by 10^4 lose nothing, as they would in E[x^2] - E[x]^2.

Cost: four passes per element in float64, of large maps five in float32, over parts that stay in the cache. Memory: 4 U
float64. Mergeable: yes, by sum once the references agree.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from actprune.statistics.base import Accumulator

_AT_ONCE_ON_CPU, _AT_ONCE = 1 << 18, 1 << 26
"""Elements that are worked on together, on a CPU and on a device."""
_LARGE = 64
"""Positions from which a map counts as large."""


def sample_moments(
    x: Tensor,  # (N, U, P) float32
) -> tuple[Tensor, Tensor]:
    """Mean and centred sum of squares over the positions of every sample, float64 (N, U) each."""
    rough = x.sum(2, keepdim=True).div_(x.shape[2])
    centred = x - rough
    correction = centred.sum(2).double() / x.shape[2]  # what rounding left in the float32 mean
    squares = centred.square_().sum(2).double() - correction.square() * x.shape[2]
    return rough.squeeze(2).double() + correction, squares.clamp_(min=0)


class Moments(Accumulator):
    """Streaming mean and variance per unit over all samples and positions.

    Args:
        n_units: units of the group at this site (U).
    """

    joinable = True
    n_values: Tensor  # ()
    reference: Tensor  # (U,) r
    shifted: Tensor  # (U,) sum of a - r
    shifted_squares: Tensor  # (U,) sum of (a - r)^2

    def __init__(self, n_units: int) -> None:
        super().__init__(n_units)
        self.add_state("n_values", torch.zeros((), dtype=torch.float64, device="cpu"), dist_reduce_fx="sum")
        self.add_state("reference", torch.full((n_units,), -torch.inf, dtype=torch.float64, device="cpu"), dist_reduce_fx="max")
        self.add_state("shifted", torch.zeros(n_units, dtype=torch.float64, device="cpu"), dist_reduce_fx="sum")
        self.add_state("shifted_squares", torch.zeros(n_units, dtype=torch.float64, device="cpu"), dist_reduce_fx="sum")

    def accumulate(self, x: Tensor, sample_ids: Tensor) -> Tensor:
        """Add a batch's moments about the reference."""
        torch.where(self.reference.isneginf(), x[0].double().mean(1), self.reference, out=self.reference)
        at_once = max(1, (_AT_ONCE_ON_CPU if x.device.type == "cpu" else _AT_ONCE) // (x.shape[1] * x.shape[2]))
        add = self._add_large if x.shape[2] >= _LARGE else self._add_small
        witnesses = [add(part) for part in x.split(at_once)]
        self.n_values.add_(len(x) * x.shape[2])
        return witnesses[0] if len(witnesses) == 1 else torch.stack(witnesses).sum(0)

    def _add_small(self, x: Tensor) -> Tensor:
        offset = x.flatten(1) - self.reference.repeat_interleave(x.shape[2])
        shifted = offset.sum(0).view(x.shape[1:]).sum(1)
        squares = offset.square_().sum(0).view(x.shape[1:]).sum(1)
        self.shifted.add_(shifted)
        self.shifted_squares.add_(squares)
        return squares

    def _add_large(self, x: Tensor) -> Tensor:
        mean, squares = sample_moments(x)
        offset = mean - self.reference
        witness = squares.sum(0)
        self.shifted.add_(x.shape[2] * offset.sum(0))
        self.shifted_squares.add_(witness + x.shape[2] * offset.square_().sum(0))
        return witness

    def evaluate(self) -> Tensor:
        """Mean and variance (divided by n), float64 (U, 2)."""
        offset = self.shifted / self.n_values
        variance = (self.shifted_squares / self.n_values - offset.square()).clamp(min=0)
        return torch.stack([self.reference + offset, variance], dim=1)

    def scale(self) -> dict[str, Tensor]:
        """The reference; -inf where this shard saw nothing."""
        return {"reference": self.reference}

    def aligned(self, shared: Mapping[str, Tensor]) -> None:
        """Express the sums about the shards' common reference."""
        move = torch.where(self.reference.isneginf(), 0.0, self.reference - shared["reference"])
        self.shifted_squares.add_(2 * move * self.shifted + self.n_values * move.square())
        self.shifted.add_(self.n_values * move)
        self.reference.copy_(shared["reference"])
