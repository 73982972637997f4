"""What a statistic was made with: those that agree in it accumulate the same."""

from __future__ import annotations

import torch
from torch import Tensor

from actprune.core.views import Statistic


def settings(statistic: Statistic) -> tuple[object, ...]:
    """Class and own plain attributes, the number of units aside; where there is anything else, the object itself."""
    plain = (bool, int, float, str, tuple, type(None))
    found: dict[str, object] = {}
    if statistic._buffers or statistic._parameters or statistic._modules:
        return (type(statistic), id(statistic))
    for name, value in vars(statistic).items():
        if name in statistic._defaults or name in _OF_METRICS or name in ("n_units", "_is_bare"):
            continue
        if not isinstance(value, plain):
            return (type(statistic), id(statistic))
        found[name] = value
    return (type(statistic), tuple(sorted(found.items(), key=lambda item: item[0])))


def is_plain(statistic: Statistic) -> bool:
    """Whether its states and settings are all there is of it, so that a copy of these makes another one."""
    return isinstance(settings(statistic)[1], tuple)


class _Bare(Statistic):
    def compute(self) -> Tensor:
        return torch.zeros(0, device="cpu")


_OF_METRICS = frozenset(vars(_Bare()))
"""Attributes that every torchmetrics object has."""
