"""Recalibrate batch norms: running mean and variance become those of the network as it is now.

Formula: cumulative averages over the batches (momentum None): every batch weighs the same.
Source: EagleEye, arXiv:2007.02491. Deviation: none of the other modules is in training mode meanwhile, so dropout is off.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import nn

from actprune.core.calling import Example, call, evaluating
from actprune.core.errors import ObservationError

_BatchNorm = nn.modules.batchnorm._BatchNorm


@contextmanager
def recalibrating(model: nn.Module) -> Iterator[list[nn.Module]]:
    """Inside the block every forward adds to fresh running statistics; modes and momenta are restored after it.

    Yields:
        The batch norms that keep running statistics.
    """
    norms = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.track_running_stats and m.running_mean is not None]
    momenta = [norm.momentum for norm in norms]
    with evaluating(model):
        try:
            for norm in norms:
                norm.reset_running_stats()
                norm.momentum = None
                norm.train()
            yield list(norms)
        finally:
            for norm, momentum in zip(norms, momenta, strict=True):
                norm.momentum = momentum


def recalibrate(model: nn.Module, batches: Iterable[Example]) -> int:
    """Recompute the running statistics of every batch norm, in place.

    Args:
        model: the model.
        batches: inputs, each as ``actprune.trace`` takes them; at least one.

    Returns:
        How many batch norms were recalibrated; 0 leaves the batches unread.

    Raises:
        ObservationError: no batch was given.

    Whatever is raised, by the model too, buffers are as they were.
    """
    before = [(buffer, buffer.clone()) for buffer in model.buffers()]
    n_batches = 0
    try:
        with recalibrating(model) as norms, torch.no_grad():
            if not norms:
                return 0
            for batch in batches:
                call(model, batch)
                n_batches += 1
        if not n_batches:
            raise ObservationError("recalibration was given 0 batches, at least 1 is needed; a generator can be used only once")
    except BaseException:
        for buffer, value in before:
            buffer.copy_(value)
        raise
    return len(norms)
