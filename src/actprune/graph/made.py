"""How a tensor was computed from parameters and buffers alone: whether it takes the place of a weight depends on that."""

from __future__ import annotations

from collections.abc import Sequence
from enum import IntEnum

from torch import Tensor

from actprune.core.operands import CONTRACTIONS


class Made(IntEnum):
    """What was done to weights; of several things the greatest counts."""

    SCALED = 0
    """Computed entry by entry, normalised, viewed, or picked by a number, as an expert's; products of vectors scale, too."""
    PRODUCT = 1
    """Matrices were multiplied: an adapter, or queries that are learned."""


_PRODUCTS = CONTRACTIONS - {"mv", "dot", "vdot"}
PICKS = {"index", "_unsafe_index", "index_select"}
"""Operators that pick rows, or matrices, by their numbers."""


def made(name: str, inputs: Sequence[Tensor]) -> tuple[Made, Sequence[Tensor]]:
    """What an operator does to weights, and which of its inputs have to be such."""
    if name in PICKS and inputs[0].dim() > len(inputs):  # two dimensions are left, for every other tensor is an index of one
        return Made.SCALED, inputs[:1]
    return Made.PRODUCT if name in _PRODUCTS else Made.SCALED, inputs
