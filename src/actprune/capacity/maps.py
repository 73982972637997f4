"""The linear map of a layer: a convolution, transposed or not, or linear layer without its bias, or a batch norm's scale."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from actprune.core.errors import ConfigError

Convolution: TypeAlias = nn.Conv1d | nn.Conv2d | nn.Conv3d
Transposed: TypeAlias = nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d
BatchNorm: TypeAlias = nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
LAYERS = (*CONVOLUTIONS, *TRANSPOSED, *NORMS, nn.Linear)
"""Modules that are linear maps, up to a bias."""

_CONVOLVE: dict[int, Callable[..., Tensor]] = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
_TRANSPOSE: dict[int, Callable[..., Tensor]] = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}


@dataclass(frozen=True)
class LinearMap:
    """x -> A x on samples of a fixed shape."""

    weight: Tensor
    """Kernel (out, in / groups, *window) of a convolution, (in, out / groups, *window) of a transposed one, (out, in) of a
    linear layer, (channels,) of a scale."""
    input_shape: tuple[int, ...]
    """Of one sample, channels first; (in,) of a linear layer, which acts on every position alike."""
    kind: str = "linear"
    """linear, convolution, transposed or scale."""
    stride: tuple[int, ...] = ()
    padding: tuple[int, ...] = ()
    """Zeros, or what ``mode`` says, (left, right) per dimension from the last one on, as ``F.pad`` takes them; of a transposed
    convolution its own ``padding``."""
    dilation: tuple[int, ...] = ()
    groups: int = 1
    mode: str = "zeros"
    """How a convolution pads: zeros, circular, reflect or replicate."""
    output_padding: tuple[int, ...] = ()

    @property
    def spatial(self) -> int:
        """Number of dimensions that a kernel slides along."""
        return self.weight.dim() - 2 if self.kind in ("convolution", "transposed") else 0

    def with_weight(self, weight: Tensor) -> LinearMap:
        """The same map with another weight of the same shape."""
        return replace(self, weight=weight)

    def scaled(self, scale: Tensor) -> LinearMap:
        """This map followed by a scale (out,) per output channel; not for transposed convolutions."""
        return replace(self, weight=self.weight * scale.reshape(-1, *[1] * (self.weight.dim() - 1)))

    def __call__(self, x: Tensor) -> Tensor:
        """Map x (*input_shape)."""
        if self.kind == "linear":
            return self.weight @ x
        if self.kind == "scale":
            return self.weight.reshape(-1, *[1] * (x.dim() - 1)) * x
        x = x.unsqueeze(0)
        if self.kind == "transposed":
            options: dict[str, Any] = {"output_padding": self.output_padding, "padding": self.padding}
            convolve = _TRANSPOSE[self.spatial]
        else:
            x = F.pad(x, self.padding, mode="constant" if self.mode == "zeros" else self.mode)
            options, convolve = {}, _CONVOLVE[self.spatial]
        return convolve(x, self.weight, None, self.stride, groups=self.groups, dilation=self.dilation, **options)[0]


def linear_map(module: nn.Module, input_shape: tuple[int, ...], dtype: torch.dtype | None = None) -> LinearMap:
    """The linear map of a layer that reads samples of ``input_shape`` (without the batch).

    Args:
        module: one of ``LAYERS``; a batch norm is that of evaluation mode.
        input_shape: channels first.
        dtype: of the weight; None: the module's own.

    Raises:
        ConfigError: the module is none of them, or a batch norm without running statistics.
    """
    if isinstance(module, nn.Linear):
        return LinearMap(_weight(module, dtype), (module.in_features,))
    if isinstance(module, NORMS):
        return LinearMap(batch_norm_scale(module, dtype), tuple(input_shape), "scale")
    if isinstance(module, CONVOLUTIONS):
        return LinearMap(
            _weight(module, dtype),
            tuple(input_shape),
            "convolution",
            module.stride,
            tuple(module._reversed_padding_repeated_twice),
            module.dilation,
            module.groups,
            module.padding_mode,
        )
    if isinstance(module, TRANSPOSED):
        return LinearMap(
            _weight(module, dtype),
            tuple(input_shape),
            "transposed",
            module.stride,
            module.padding,  # type: ignore[arg-type]
            module.dilation,
            module.groups,
            output_padding=module.output_padding,
        )
    raise ConfigError(f"{type(module).__name__} is no linear map; give a convolution, a linear layer or a batch norm")


def batch_norm_scale(module: BatchNorm, dtype: torch.dtype | None = None) -> Tensor:
    """What a batch norm multiplies its channels by in evaluation mode, (channels,): weight / sqrt(running_var + eps).

    Raises:
        ConfigError: the module keeps no running statistics, so it is no linear map.
    """
    if module.running_var is None:
        raise ConfigError("this batch norm has track_running_stats=False: its scale depends on the batch, and has no constant")
    variance = module.running_var.detach().to(dtype or module.running_var.dtype)
    scale = (variance + module.eps).rsqrt()
    return scale if module.weight is None else scale * module.weight.detach().to(scale)


def _weight(module: Any, dtype: torch.dtype | None) -> Tensor:
    weight = module.weight.detach()
    return weight if dtype is None else weight.to(dtype)
