"""Mean, variance and mean square of every unit's activations.

Formula: per sample the mean m_i over its P positions and the centred sum of squares M_i in float32, across samples in
float64 about a reference r (the first batch's mean): n, sum P (m_i - r), sum M_i + P (m_i - r)^2.
Source: Chan, Golub & LeVeque 1983 (pairwise merging). Each sample's share is a function of that sample alone, so the
result does not depend on batches; data offset by 10^4 lose nothing, as they would in E[x^2] - E[x]^2.

Cost: five cheap passes per element, over parts that stay in the cache. Memory: 4 U float64. Mergeable: yes, by sum once the
references agree.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from actprune.statistics.base import Accumulator

_AT_ONCE = 1 << 18
"""Elements that are worked on together."""


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

    n_values: Tensor  # ()
    reference: Tensor  # (U,) r
    shifted: Tensor  # (U,) sum of a - r
    shifted_squares: Tensor  # (U,) sum of (a - r)^2

    def __init__(self, n_units: int) -> None:
        super().__init__(n_units)
        self.add_state("n_values", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("reference", torch.full((n_units,), -torch.inf, dtype=torch.float64), dist_reduce_fx="max")
        self.add_state("shifted", torch.zeros(n_units, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("shifted_squares", torch.zeros(n_units, dtype=torch.float64), dist_reduce_fx="sum")

    def accumulate(self, x: Tensor, sample_ids: Tensor) -> Tensor:
        """Add a batch's moments about the reference."""
        at_once = max(1, _AT_ONCE // (x.shape[1] * x.shape[2]))
        parts = [sample_moments(part) for part in x.split(at_once)]
        mean, squares = parts[0] if len(parts) == 1 else (torch.cat(both) for both in zip(*parts, strict=True))
        torch.where(self.reference.isneginf(), mean.mean(0), self.reference, out=self.reference)
        offset = mean - self.reference
        witness = squares.sum(0)
        self.n_values.add_(len(x) * x.shape[2])
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
