"""Mean replacement: a removed unit is a constant, its mean; constant times weight goes into the consumer's bias.

Formula: b' = b + sum_{c gone} mu_c sum_taps W[:, c, taps]. Residual per output: w^T Sigma w over the removed inputs, so a
unit of zero variance leaves without changing the function (zero-padded convolutions: away from the border). Where maps are
so small that most taps meet the padding, that sum would cost more than it saves: there b' gains its mean over all positions,
with the padding's zeros, which is never worse than plain cutting. Every map counts the same in mu_c, also where maps differ
in size.
Source: variance-based pruning with mean shift, arXiv:2507.12988; FLAP, arXiv:2312.11983.
Transposed convolutions: every output sees 1 / prod(stride) of the taps on average; exact where the kernel is a multiple of
the stride and all taps are alike.
"""

from __future__ import annotations

import logging
import math

import torch
from torch import Tensor

from actprune.compensation.base import Compensation, Fold, Layer
from actprune.compensation.patches import Transposed, pads_zeros, taps_seen
from actprune.core.views import Statistic
from actprune.statistics import Moments

_LOG = logging.getLogger(__name__)


class Mean(Compensation):
    """Fold the mean of what leaves into the bias of what reads it."""

    def statistic(self, layer: Layer, n_channels: int) -> Statistic:
        """Mean of every input channel."""
        return Moments(n_channels)

    def fold(self, layer: Layer, statistic: Statistic, gone: Tensor) -> Fold:
        """Constant times weight, summed over what leaves and over kernel taps."""
        mean = statistic.compute()[:, 0]
        gone = gone.to(mean.device)
        return Fold(bias=fold_mean(layer, torch.where(gone, mean, torch.zeros_like(mean))))


def fold_mean(
    layer: Layer,
    mean: Tensor,  # (C,) float64, zero for what stays
) -> Tensor:
    """What each output gains when channels leave whose means are given, float64 (out,)."""
    shift, _, inside = constant_response(layer, mean, mean)
    if not inside:
        _LOG.warning("%s: maps of %s are mostly border: the mean with the padding's zeros is folded", layer.name, layer.space)
    return shift


def constant_response(
    layer: Layer,
    constant: Tensor,  # (C,) float64
    mean: Tensor,  # (C,) float64
) -> tuple[Tensor, float, bool]:
    """What the layer adds to each output where every input channel is a constant.

    Returns:
        Float64 (out,); its mean square error over positions, as taps that meet the padding read no constant, minus what cutting
        channels of these means plainly would cost; and whether it is the response inside, where every tap reads the constant,
        or, where that would cost more than cutting plainly, the mean response.
    """
    response, lost = (_by_tap(layer, values) for values in (constant, mean))
    inside = response.sum(0)
    if isinstance(layer.module, Transposed):
        return inside / math.prod(layer.module.stride), 0.0, True
    if layer.space is None or not pads_zeros(layer.module, layer.weight):
        return inside, -float(lost.sum(0).square().sum()), True
    seen, share = (values.to(response.device) for values in taps_seen(layer.module, layer.space))
    at = seen @ response  # (patterns, out)
    plain = share @ (seen @ lost).square().sum(1)
    error = share @ (at - inside).square().sum(1)
    if error <= plain:
        return inside, float(error - plain), True
    average = share @ at
    return average, float(share @ (at - average).square().sum(1) - plain), False


def _by_tap(layer: Layer, values: Tensor) -> Tensor:
    """(taps, out) what each tap adds where input channels have these values."""
    weight = layer.weight.detach().double().movedim(layer.reads_dim, 0)
    return torch.einsum("c,cot->to", values.to(weight.device), weight.reshape(*weight.shape[:2], -1))
