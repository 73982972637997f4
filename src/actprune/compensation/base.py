"""Compensation: fold what the removed units contributed into what stays."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

from torch import Tensor, nn

from actprune.core.views import Statistic


@dataclass
class Layer:
    """One consumer of cuttable units, as compensation sees it."""

    name: str
    """Path of its module."""
    module: nn.Module
    weight: Tensor
    """(out, in, ...) or, where ``reads_dim`` is 0, (in, out, ...)."""
    reads_dim: int
    """The weight's dimension that is summed over."""
    runs: int = 1
    """How often one forward uses the weight."""
    space: tuple[int, ...] | None = None
    """Extent of the maps that it read last; None before it was observed."""
    intercept: bool = True
    """Whether a bias, or a batch norm that alone reads its outputs, can shift them."""

    def sees(self, x: Tensor) -> None:
        """Remember the extent of the maps in x (N, C, *space), or (N, C, *space, R) of R rows each: frames of a video."""
        n_space = self.weight.dim() - 2
        self.space = tuple(x.shape[2 : 2 + n_space] if n_space else x.shape[2:])


@dataclass(frozen=True)
class Fold:
    """What a layer's tensors gain so that it says the same without the removed units."""

    bias: Tensor
    """(out,) float64, added to the bias, or taken off the running mean of the batch norm that follows."""
    weight: Tensor | None = None
    """Float64, of the weight's shape, added to it; None leaves the weight."""


class Compensation(ABC):
    """Observes what layers read, and computes folds once it is known what leaves."""

    @abstractmethod
    def statistic(self, layer: Layer, n_channels: int) -> Statistic | None:
        """The statistic to accumulate at the layer's input; None where this layer cannot be compensated."""

    def observe(
        self,
        statistic: Statistic,
        layer: Layer,
        x: Tensor,  # (N, C, *positions)
        sample_ids: Tensor,  # (N,)
    ) -> None:
        """Accumulate one batch of the layer's input."""
        statistic.update(x.reshape(*x.shape[:2], -1), sample_ids)

    @abstractmethod
    def fold(
        self,
        layer: Layer,
        statistic: Statistic,
        gone: Tensor,  # (C,) bool
    ) -> Fold:
        """What the layer gains when the marked input channels leave."""
