"""Exact cost of any cut before it is made: parameters and multiply-adds as products of kept widths.

A parameter's element count is the product of its dimensions, a contraction's multiply-adds the product of its batch,
positions, kernel and the widths it sums over and produces. One multiply-add counts as 1.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Product:
    """One term: ``constant`` times the kept length of every width."""

    constant: int
    widths: tuple[int, ...]
    """Indices into ``CostModel.columns``."""


class CostModel:
    """Sums of products of widths; every width is an array of class indices, -1 where nothing can leave."""

    def __init__(self, n_classes: int) -> None:
        self._n_classes = n_classes
        self._columns: list[NDArray[np.int64]] = []
        self._known: dict[bytes, int] = {}
        self._terms: dict[str, list[Product]] = {"params": [], "macs": []}

    def add(self, unit: str, constant: int, widths: list[NDArray[np.int64]]) -> None:
        """Add ``constant * prod(kept length of each width)`` to ``unit`` (``"params"`` or ``"macs"``)."""
        indices = []
        for column in widths:
            key = column.tobytes()
            if key not in self._known:
                self._known[key] = len(self._columns)
                self._columns.append(column)
            indices.append(self._known[key])
        self._terms[unit].append(Product(constant, tuple(indices)))

    def evaluate(self, unit: str, removed: NDArray[np.bool_] | None = None) -> int:
        """Count what is left when the classes marked in ``removed`` are gone.

        Args:
            unit: ``"params"`` (elements) or ``"macs"`` (multiply-adds of one call on the example).
            removed: (n_classes,) mask, or None for the model as it is.
        """
        if removed is None:
            kept = [len(column) for column in self._columns]
        else:
            # class -1 indexes the appended entry: never removed
            stays = np.append(~removed, True)
            kept = [int(stays[column].sum()) for column in self._columns]
        return sum(term.constant * int(np.prod([kept[i] for i in term.widths], dtype=object)) for term in self._terms[unit])
