"""Least squares: what remains is refitted so that the layer says what it said.

Formula: with x what the layer reads together (C channels times kernel taps), mu and G its mean and covariance, R what
leaves and K what stays: x_R is predicted from x_K, B = G_RK (G_KK + lambda I)^-1, and

    W'_K = W_K + W_R B,    b' = b + W_R mu_R - W_R B mu_K,

the minimum of E |W x - W' x_K - b'|^2 + lambda |W' - W_K|^2: a ridge that pulls towards the old weights. Where no bias and no
batch norm can take b', mu is 0 and G holds the moments about zero.
Source: He et al., arXiv:1707.06168, and ThiNet, arXiv:1707.06342, which refit without the ridge's centre.
Deviation: positions are sampled, `positions` per sample. Where the covariance of patches would need more than `memory`
bytes, or the convolution is transposed, x are the channels alone and every tap gets the same B; where that does not fit
either, or one weight is used several times, the mean is folded. All of it is logged.
"""

from __future__ import annotations

import logging
import math

import torch
from torch import Tensor

from actprune.compensation.base import Compensation, Fold, Layer
from actprune.compensation.mean import Mean, constant_response, fold_mean
from actprune.compensation.patches import n_positions, pads_zeros, patches_at, reads_patches, taps_seen
from actprune.compensation.solve import ridge_solve
from actprune.core.errors import ConfigError
from actprune.core.views import Statistic
from actprune.statistics import Gram, sample_positions

_LOG = logging.getLogger(__name__)
_BYTES = 8  # float64
REFITS = ("sequential", "once")


class LeastSquares(Compensation):
    """Refit what stays by ridge regression on second moments of what layers read.

    Args:
        ridge: lambda over the mean variance of what is read, >= 0.
        positions: positions per sample whose patches are observed, >= 1.
        memory: bytes that one layer's covariance may take, and in the sequential refit one layer's inputs.
        refit: ``"once"``: from the moments of the network before the cut. ``"sequential"``: that, and then, where all
            calibration data are at hand (``prune``), every layer again front to back on the network that was cut.
        recalibrate: whether ``prune`` recomputes the running statistics of batch norms afterwards; None: only where the
            refit is not sequential, which fits them itself.
        seed: seed of the sampled positions.

    Raises:
        ConfigError: a value is outside what it may be.
    """

    def __init__(
        self,
        ridge: float = 1e-3,
        positions: int = 16,
        memory: int = 2**28,
        refit: str = "sequential",
        recalibrate: bool | None = None,
        seed: int = 0,
    ) -> None:
        if not 0 <= ridge < math.inf:
            raise ConfigError(f"ridge={ridge!r} must be a share of the mean variance, at least 0, e.g. 1e-3")
        if positions < 1:
            raise ConfigError(f"positions={positions!r} must be at least 1 per sample")
        if memory < 0:
            raise ConfigError(f"memory={memory!r} must be a number of bytes, e.g. 268435456")
        if refit not in REFITS:
            raise ConfigError(f"refit={refit!r} is not known; choose one of {', '.join(REFITS)}")
        self.ridge = ridge
        self.positions = positions
        self.memory = memory
        self.refit = refit
        self.recalibrate = recalibrate
        self.seed = seed
        self._mean = Mean()

    def statistic(self, layer: Layer, n_channels: int) -> Statistic:
        """Covariance of patches, else of channels, else the mean of every channel."""
        taps = layer.weight[0, 0].numel() if layer.weight.dim() > 2 else 1
        if layer.runs > 1:
            _LOG.warning("%s: its weight is used %d times: the mean is folded instead", layer.name, layer.runs)
            return self._mean.statistic(layer, n_channels)
        if reads_patches(layer.module, layer.weight):
            if self._fits(n_channels * taps):
                return Gram(n_channels * taps)
            if taps > 1:
                _LOG.warning(
                    "%s: a covariance of %d channels x %d taps needs %d bytes, memory=%d: channels only",
                    layer.name, n_channels, taps, _BYTES * (n_channels * taps) ** 2, self.memory,
                )  # fmt: skip
        elif taps > 1:
            _LOG.warning("%s: %s: channels only", layer.name, type(layer.module).__name__)
        if self._fits(n_channels):
            return Gram(n_channels)
        _LOG.warning(
            "%s: a covariance of %d channels needs %d bytes, memory=%d: the mean is folded instead",
            layer.name, n_channels, _BYTES * n_channels**2, self.memory,
        )  # fmt: skip
        return self._mean.statistic(layer, n_channels)

    def _fits(self, width: int) -> bool:
        return _BYTES * width**2 <= self.memory

    def observe(self, statistic: Statistic, layer: Layer, x: Tensor, sample_ids: Tensor) -> None:
        """Accumulate patches at sampled positions."""
        if not isinstance(statistic, Gram):
            super().observe(statistic, layer, x, sample_ids)
            return
        if reads_patches(layer.module, layer.weight) and statistic.n_units == layer.weight[0].numel():
            n_space = x.dim() - 2 - (layer.weight.dim() - 2)
            if n_space:
                # several maps per sample: each is a sample of its own here
                sample_ids = sample_ids.repeat_interleave(math.prod(x.shape[-n_space:]))
                x = x.flatten(-n_space).movedim(-1, 1).flatten(0, 1)
            module: torch.nn.Module = layer.module
        else:
            module = torch.nn.Identity()
        drawn = sample_positions(sample_ids.to(x.device), n_positions(x, module), self.positions, self.seed)
        statistic.update(patches_at(x, module, drawn).transpose(1, 2), sample_ids)

    def fold(self, layer: Layer, statistic: Statistic, gone: Tensor) -> Fold:
        """Weights and bias that stand in for what leaves; the mean alone where that predicts no worse."""
        if not isinstance(statistic, Gram):
            return self._mean.fold(layer, statistic, gone)
        values = statistic.compute()
        mean, covariance = values[:, 0], values[:, 1:]
        if not layer.intercept:  # moments about zero: what is best where nothing can be added
            mean, covariance = torch.zeros_like(mean), covariance + torch.outer(mean, mean)
        gone = gone.to(mean.device)
        weight = layer.weight.detach().double().movedim(layer.reads_dim, 1).to(mean.device)  # (out, C, *taps)
        by_input = weight.flatten(1)
        if by_input.shape[1] != len(mean):
            return self._over_channels(layer, weight, mean, covariance, gone)
        leaves = gone.repeat_interleave(len(mean) // len(gone))
        removed = by_input[:, leaves]
        delta = removed @ prediction(covariance, leaves, self.ridge)
        if excess(removed, delta, covariance, leaves) > 0:
            _LOG.warning("%s: the refit explains nothing of what leaves: the mean is folded instead", layer.name)
            delta = torch.zeros_like(delta)
        shift = torch.zeros_like(by_input)
        shift[:, ~leaves] = delta
        bias = removed @ mean[leaves] - delta @ mean[~leaves]
        return Fold(bias=bias, weight=shift.reshape(weight.shape).movedim(1, layer.reads_dim))

    def _over_channels(self, layer: Layer, weight: Tensor, mean: Tensor, covariance: Tensor, gone: Tensor) -> Fold:
        left = torch.where(gone, mean, torch.zeros_like(mean))
        by_channel = prediction(covariance, gone, self.ridge)
        flat = weight.flatten(2)
        removed = flat[:, gone].movedim(1, 2).flatten(0, 1)
        delta = removed @ by_channel
        constant = torch.zeros_like(mean)
        constant[gone] = mean[gone] - by_channel @ mean[~gone]
        bias, border, _ = constant_response(layer, constant, left)
        gained = excess(removed, delta, covariance, gone)
        # taps that meet the padding read nothing of what stays either, but the constant is added there too
        if gained > 0 or gained * _share_seen(layer) + border > 0:
            _LOG.warning("%s: the refit explains nothing of what leaves: the mean is folded instead", layer.name)
            return Fold(bias=fold_mean(layer, left))
        shift = torch.zeros_like(flat)
        shift[:, ~gone] = delta.unflatten(0, (len(flat), -1)).movedim(2, 1)
        return Fold(bias=bias, weight=shift.reshape(weight.shape).movedim(1, layer.reads_dim))


def _share_seen(layer: Layer) -> float:
    """Of all taps at all positions, the share that meets the map and not its padding."""
    if layer.space is None or not pads_zeros(layer.module, layer.weight):
        return 1.0
    seen, share = taps_seen(layer.module, layer.space)
    return float(share @ seen.mean(1))


def prediction(
    covariance: Tensor,  # (d, d)
    gone: Tensor,  # (d,) bool
    ridge: float,
) -> Tensor:
    """B = G_RK (G_KK + lambda I)^-1: what leaves, predicted from what stays; float64 (n gone, n kept)."""
    within = covariance[~gone][:, ~gone]
    between = covariance[~gone][:, gone]
    return ridge_solve(within, between, ridge).T


def excess(
    removed: Tensor,  # (out, n gone)
    delta: Tensor,  # (out, n kept)
    covariance: Tensor,
    gone: Tensor,
) -> Tensor:
    """Mean square error of the refit minus that of folding the mean, summed over outputs: what the refit costs."""
    between = covariance[~gone][:, gone]
    within = covariance[~gone][:, ~gone]
    return ((delta @ within) * delta).sum() - 2 * ((delta @ between) * removed).sum()
