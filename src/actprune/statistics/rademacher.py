"""Empirical Rademacher complexity of what a unit computes, as a scalar function class {w a : |w| <= 1}.

Formula: with a_i the unit's activation on sample i and fair signs sigma_i = +-1,

    R(u) = (1/n) E_sigma sup_|w|<=1 sum_i sigma_i w a_i = (1/n) E_sigma |sum_i sigma_i a_i|.

Bounds (Khinchine, constants of Szarek 1976): ||a|| / (sqrt(2) n) <= R <= ||a|| / n; for many alike samples the central
limit gives sqrt(2/pi) ||a|| / n. Hence R ranks units as their root mean square does, up to the error of Monte Carlo.

No paper ranks units by R; the definition is this project's. Monte Carlo keeps S[m, u] = sum_i sigma[m, i] a_i for
replicates m; sigma is drawn by a counter keyed by sample id (and position), so that batches and shards add up exactly,
and the absolute value is taken once, at the end.

Cost: ``gap``: one sum over positions, then ``replicates`` multiply-adds per sample and unit; ``positions``: that many
per element. Memory: U x replicates float64. Mergeable: yes, by sum.
"""

from __future__ import annotations

import math
import weakref

import torch
from torch import Tensor

from actprune.core.errors import ConfigError
from actprune.core.tensors import writes
from actprune.statistics.base import Accumulator, check_pool
from actprune.statistics.counter import hashed, signs

_SIGNS_AT_ONCE = 1 << 22


class _Latest:
    """The signs that were asked for last: all sites of a network want the same ones for a batch. They go with its ids."""

    def __init__(self) -> None:
        self._known: tuple[weakref.ref[Tensor], int | None, Tensor, int, int, Tensor] | None = None

    def signs(self, sample_ids: Tensor, replicates: int, seed: int) -> Tensor:
        """Signs (N, replicates) of pooled maps, whose position counts as 0."""
        if self._known is not None:
            ids, version, copy, *settings, known = self._known
            if settings == [replicates, seed] and _same(sample_ids, ids(), version, copy):
                return known
        drawn = signs(hashed(0, sample_ids, torch.zeros_like(sample_ids)), replicates, seed, torch.float64)
        ids = weakref.ref(sample_ids, self._forget)
        self._known = (ids, writes(sample_ids), sample_ids.clone(), replicates, seed, drawn)
        return drawn

    def _forget(self, ids: weakref.ref[Tensor]) -> None:
        if self._known is not None and self._known[0] is ids:
            self._known = None


def _same(sample_ids: Tensor, known: Tensor | None, version: int | None, copy: Tensor) -> bool:
    """Whether these are the samples that ``copy`` was made of; only a CPU may look, a device's have to be the same tensor."""
    if sample_ids.device != copy.device:
        return False
    if copy.device.type == "cpu":
        return torch.equal(sample_ids, copy)
    return sample_ids is known and version is not None and writes(sample_ids) == version


_LATEST = _Latest()


class LinearRademacher(Accumulator):
    """Signed sums over the samples, and the sum of squares that bounds them.

    Args:
        n_units: units of the group at this site (U).
        replicates: Monte Carlo draws of the signs; 0 keeps the sum of squares only.
        pool: ``"gap"``: a_i is the mean of sample i's map (one independent sample, one sign; the default because the
            theory wants independent samples); ``"positions"``: every position is a sample of its own.
        seed: of the signs.

    Raises:
        ConfigError: negative ``replicates``, unknown ``pool``.
    """

    joinable = True
    signed: Tensor  # (U, M) sum_i sigma_i a_i
    squares: Tensor  # (U,) sum_i a_i^2
    n_terms: Tensor  # () n

    def __init__(self, n_units: int, replicates: int = 64, pool: str = "gap", seed: int = 0) -> None:
        super().__init__(n_units)
        if replicates < 0:
            raise ConfigError(f"replicates={replicates} must be 0 or more; the relative error is 0.76 / sqrt(replicates)")
        check_pool(pool)
        self.replicates, self.pool, self.seed = replicates, pool, seed
        self.whole_maps = self.means_do = pool == "gap"  # the mean of a few positions is not the mean of the map
        self.add_state("signed", torch.zeros(n_units, replicates, dtype=torch.float64, device="cpu"), dist_reduce_fx="sum")
        self.add_state("squares", torch.zeros(n_units, dtype=torch.float64, device="cpu"), dist_reduce_fx="sum")
        self.add_state("n_terms", torch.zeros((), dtype=torch.float64, device="cpu"), dist_reduce_fx="sum")

    def accumulate(self, x: Tensor, sample_ids: Tensor) -> Tensor:
        """Add a batch's signed sums and squares."""
        if self.pool == "gap" or x.shape[2] == 1:
            pooled = x.mean(2).double()  # (N, U)
            self.n_terms.add_(len(x))
            self.squares.add_(pooled.square().sum(0))
            if self.replicates:
                self.signed.addmm_(pooled.T, self._signs(sample_ids, None))
            return pooled.sum(0)
        self.n_terms.add_(len(x) * x.shape[2])
        squares = x.square().sum(2).sum(0, dtype=torch.float64)
        self.squares.add_(squares)
        if self.replicates:
            positions = torch.arange(x.shape[2], device=x.device)
            at_once = max(1, _SIGNS_AT_ONCE // (self.replicates * x.shape[2]))
            for part, ids in zip(x.split(at_once), sample_ids.split(at_once), strict=True):
                drawn = self._signs(ids.unsqueeze(1), positions).flatten(0, 1)  # (n P, replicates)
                self.signed.addmm_(part.movedim(1, 2).flatten(0, 1).double().T, drawn)
        return squares

    def _signs(self, sample_ids: Tensor, positions: Tensor | None) -> Tensor:
        """Signs (..., replicates), of pooled maps where ``positions`` is None; float64, as the products: exact in any batch."""
        if positions is None:
            return _LATEST.signs(sample_ids, self.replicates, self.seed)
        return signs(hashed(0, sample_ids, positions), self.replicates, self.seed, torch.float64)

    def evaluate(self) -> Tensor:
        """Monte Carlo estimate of R, float64 (U,).

        Raises:
            ConfigError: ``replicates`` is 0.
        """
        if not self.replicates:
            raise ConfigError("replicates=0 leaves nothing to estimate from; ask for bounds() or set replicates=64")
        return self.signed.abs().mean(1) / self.n_terms

    def bounds(self) -> tuple[Tensor, Tensor]:
        """Lower and upper bound of R: ||a|| / (sqrt(2) n) and ||a|| / n, float64 (U,) each."""
        self.check()
        upper = self.squares.sqrt() / self.n_terms
        return upper / math.sqrt(2), upper

    def normal_limit(self) -> Tensor:
        """R when many alike samples are seen: sqrt(2/pi) ||a|| / n, float64 (U,)."""
        return self.bounds()[1] * math.sqrt(2 / math.pi)
