"""Small questions to tensors."""

from __future__ import annotations

import torch
from torch import Tensor


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
