"""Where kernels of Triton run."""

from __future__ import annotations

import functools
import logging
from types import ModuleType

import torch

_LOG = logging.getLogger(__name__)


@functools.cache
def kernels(device: torch.device) -> ModuleType | None:
    """``statistics.kernels``, where this device can run them; else None."""
    if device.type != "cuda":
        return None
    try:
        from actprune.statistics import kernels as found

        found.try_out(device)
    except Exception as error:
        _LOG.info("places are read one by one, which takes longer: %s: %s", type(error).__name__, error)
        return None
    return found
