"""Mean replacement: a removed unit is a constant, its mean; constant times weight goes into the consumer's bias.

Formula: b' = b + sum_{c gone} mu_c sum_taps W[:, c, taps]. Residual per output: w^T Sigma w over the removed inputs, so a
unit of zero variance leaves without changing the function (zero-padded convolutions: away from the border).
Source: variance-based pruning with mean shift, arXiv:2507.12988; FLAP, arXiv:2312.11983.
Transposed convolutions: every output sees 1 / prod(stride) of the taps on average; exact where the kernel is a multiple of
the stride and all taps are alike.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from actprune.compensation.base import Compensation, Fold, Layer
from actprune.core.views import Statistic
from actprune.statistics import Moments


class Mean(Compensation):
    """Fold the mean of what leaves into the bias of what reads it."""

    def statistic(self, layer: Layer, n_channels: int) -> Statistic:
        """Mean of every input channel."""
        return Moments(n_channels)

    def fold(self, layer: Layer, statistic: Statistic, gone: Tensor) -> Fold:
        """Constant times weight, summed over what leaves and over kernel taps."""
        mean = statistic.compute()[:, 0]
        gone = gone.to(mean.device)
        return Fold(bias=constant_response(layer, torch.where(gone, mean, torch.zeros_like(mean))))


def constant_response(
    layer: Layer,
    constant: Tensor,  # (C,) float64
) -> Tensor:
    """What the layer adds to each output where every input channel is a constant, float64 (out,)."""
    weight = layer.weight.detach().double().movedim(layer.reads_dim, 0)
    weight = weight.reshape(*weight.shape[:2], -1).sum(2)
    response = constant.to(weight.device) @ weight
    if isinstance(layer.module, nn.modules.conv._ConvTransposeNd):
        response = response / math.prod(layer.module.stride)
    return response
