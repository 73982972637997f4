"""What a network's outputs are worth, sample by sample: its loss and whether it is right."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from actprune.core.errors import ObservationError
from actprune.core.labels import is_class_vector
from actprune.core.outputs import logits_of

Judge = Callable[[Any, Any], Tensor]
"""Outputs and targets of a batch -> (N, 2): every sample's loss, and 1 where it is right."""


def classification(
    outputs: Any,  # (N, classes) logits, or what holds them, see ``logits_of``
    targets: Tensor,  # (N,) classes
) -> Tensor:
    """Cross entropy and top-1 of every sample, float64 (N, 2).

    Raises:
        ObservationError: the outputs or the targets are not those of a classifier.
    """
    n = len(targets) if isinstance(targets, Tensor) and targets.dim() else 0
    logits = logits_of(outputs, n) if is_class_vector(targets, n) else None
    if logits is None or logits.dim() != 2:
        outside = f"outputs {tuple(logits.shape)}" if logits is not None else f"targets {_kind(targets)}"
        raise ObservationError(
            f"a classifier is judged by outputs (N, classes) and targets (N,) of integers, got {outside}; "
            "pass judge=f with f(outputs, targets) -> (N, 2), the loss of every sample and 1 where it is right"
        )
    if bool((targets < 0).any()) or bool((targets >= logits.shape[1]).any()):
        raise ObservationError(
            f"targets go from {int(targets.min())} to {int(targets.max())}, outputs are of classes 0 to {logits.shape[1] - 1}; "
            "leave out samples without a class"
        )
    losses = functional.cross_entropy(logits.float(), targets.long(), reduction="none")
    return torch.stack([losses, logits.argmax(1) == targets], dim=1).double()


def judged(judge: Judge, outputs: Any, targets: Any) -> Tensor:
    """Ask a judge, float64 (N, 2) on the CPU.

    Raises:
        ObservationError: it returned something else.
    """
    found = judge(outputs, targets)
    if not isinstance(found, Tensor) or found.dim() != 2 or found.shape[1] != 2:
        raise ObservationError(f"judge returned {_kind(found)}; it must return (N, 2), loss and rightness of every sample")
    return found.detach().cpu().double()


def _kind(targets: Any) -> str:
    return f"{tuple(targets.shape)} of {targets.dtype}" if isinstance(targets, Tensor) else type(targets).__name__
