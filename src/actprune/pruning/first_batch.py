"""The first batch: each place holds what it was given, and a copy, until it is known whether that stays as it was."""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor

from actprune.core.tensors import writes
from actprune.pruning.kept import Place
from actprune.pruning.reads import Reads


@dataclass
class Trial:
    """A place, what it was given and a copy of that: not every write is counted."""

    place: Place
    x: Tensor
    copy: Tensor
    writes: int | None


class FirstBatch:
    """What is not read yet of it."""

    def __init__(self) -> None:
        self._trials: dict[int, Trial] = {}
        self.kept = 0
        """Bytes, copies aside."""

    def add(self, place: Place, x: Tensor) -> None:
        """A place was given x, contiguous."""
        self._trials[id(place.reads)] = Trial(place, x, x.detach().clone(), writes(x))
        self.kept += x.numel() * x.element_size()

    def withdraw(self, reads: Reads) -> Tensor | None:
        """Take back what a place was given, as it was; None if nothing is held of it."""
        trial = self._trials.pop(id(reads), None)
        if trial is None:
            return None
        self.kept -= trial.x.numel() * trial.x.element_size()
        return trial.copy

    def clear(self) -> None:
        """Hold nothing."""
        self._trials, self.kept = {}, 0

    def over(self, kernels: ModuleType, device: torch.device) -> tuple[list[Trial], list[Trial]]:
        """All trials, those whose tensor is as it was given and those whose is not; none is held. The host waits once."""
        trials = list(self._trials.values())
        self.clear()
        differ = kernels.differ([(trial.x, trial.copy) for trial in trials], device).tolist() if trials else []
        same: list[Trial] = []
        changed: list[Trial] = []
        for trial, bits in zip(trials, differ, strict=True):
            (changed if bits or writes(trial.x) != trial.writes else same).append(trial)
        return same, changed
