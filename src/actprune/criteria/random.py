"""Uniform scores: the baseline that every criterion has to beat.

A pure function of the seed, the group's name and the unit's number: the same on every rank and in any order of groups.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor

from actprune.core.views import Criterion, GroupView
from actprune.statistics.counter import uniform


@dataclass(frozen=True)
class Random(Criterion):
    """Independent uniform numbers in [0, 1)."""

    def score(self, view: GroupView) -> Tensor:
        """Draw from the counter keyed by seed, group and unit."""
        name = int.from_bytes(hashlib.blake2b(view.name.encode(), digest_size=7).digest(), "big")
        return uniform(view.seed, torch.tensor(name, device="cpu"), torch.arange(view.size, device="cpu"))
