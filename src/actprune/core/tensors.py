"""Small questions to tensors."""

from __future__ import annotations

from typing import TypeGuard

import torch
from torch import Tensor, nn


def is_ordinary(x: object) -> TypeGuard[Tensor]:
    """Whether x is a tensor whose elements lie in memory: of no subclass, dense, not wrapped by ``torch.func``."""
    return (
        (type(x) is Tensor or type(x) is nn.Parameter)
        and x.layout is torch.strided
        and not torch._C._functorch.is_functorch_wrapped_tensor(x)
    )


def writes(x: Tensor) -> int | None:
    """How often x was written to; None where PyTorch does not count, under inference mode."""
    return None if x.is_inference() else x._version


def sent(x: Tensor, device: torch.device) -> Tensor:
    """What a CPU holds, on a device; the host does not wait for the copy."""
    return x.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else x.to(device)


def listed(numbers: Tensor | range) -> Tensor:
    """Numbers as a tensor on the CPU."""
    if isinstance(numbers, Tensor):
        return numbers
    stop = numbers.start + len(numbers) * numbers.step  # that of an empty one may lie before its start
    return torch.arange(numbers.start, stop, numbers.step, device="cpu")


def real(x: Tensor) -> Tensor:
    """Rows (U, n), of complex numbers (U, 2 n) their real and imaginary parts."""
    return torch.view_as_real(x.resolve_conj()).flatten(1) if x.is_complex() else x
