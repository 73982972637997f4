"""What all sites of a batch share: the samples' ids where the activations are, and the positions drawn for each sample."""

from __future__ import annotations

import torch
from torch import Tensor

from actprune.statistics import at_positions, position_bits, sample_positions


class Sampling:
    """Draws and copies once per batch; nothing waits for a device.

    Args:
        positions: how many of each unit's positions in a sample are seen; None: all.
    """

    def __init__(self, positions: int | None) -> None:
        self._positions = positions
        self._drawn: dict[tuple[int, torch.device], tuple[Tensor, Tensor]] = {}
        self._bits: tuple[Tensor, Tensor] | None = None
        self._there: dict[torch.device, tuple[Tensor, Tensor]] = {}
        self._indices: dict[tuple[int, torch.device], tuple[Tensor, Tensor]] = {}
        self._numbers: tuple[int, Tensor] = (0, torch.empty(0, dtype=torch.int64))

    def samples(self, seen: int) -> bool:
        """Whether of so many positions only some are seen."""
        return self._positions is not None and self._positions < seen

    def draw(self, ids: Tensor, seen: int, device: torch.device) -> Tensor:
        """The positions of every sample, (N, k); drawn once per batch for all maps of one size."""
        known = self._drawn.get((seen, device))
        if known is None or known[0] is not ids:
            assert self._positions is not None
            # where the ids are: a draw is many small operations, for a device more work than its copy
            if self._bits is None or self._bits[0] is not ids:
                self._bits = (ids, position_bits(ids, self._positions, seed=0))
            drawn = sample_positions(ids, seen, self._positions, seed=0, bits=self._bits[1])
            known = self._drawn[seen, device] = (ids, drawn.to(device, non_blocking=True))
        return known[1]

    def numbered(self, start: int, n: int) -> Tensor:
        """Ids from ``start`` on for rows that are no samples; the same tensor for reads of one batch that have as many."""
        if self._numbers[0] != start or len(self._numbers[1]) != n:
            self._numbers = (start, torch.arange(start, start + n))
        return self._numbers[1]

    def on(self, device: torch.device, ids: Tensor) -> Tensor:
        """The ids on a device, one copy per batch."""
        if ids.device == device:
            return ids
        known = self._there.get(device)
        if known is None or known[0] is not ids:
            with torch.inference_mode(False):
                known = self._there[device] = (ids, ids.to(device, non_blocking=True))
        return known[1]

    def placed(self, index: Tensor, device: torch.device) -> Tensor:
        """Channels on a device, copied there once; ``index`` lives as long as this object."""
        if index.device == device:
            return index
        known = self._indices.get((id(index), device))
        if known is None:
            known = self._indices[id(index), device] = (index, index.to(device))
        return known[1]


class Reading:
    """What one place reads in one batch, and what the groups that are read there have of it; made once for all of them.

    Args:
        sampling: draws the positions.
        x: (N, C, P) activations.
        ids: (N,) of the samples.
    """

    def __init__(self, sampling: Sampling, x: Tensor, ids: Tensor) -> None:
        self._sampling, self._x, self._ids = sampling, x, ids
        self._few: Tensor | None = None
        self._mean: Tensor | None = None

    def few(self, units: int, index: Tensor | None) -> Tensor:
        """A few positions of every unit, (N, U, k).

        Args:
            units: how many there are (U).
            index: (U, width) the channels of every unit; None: unit i is channel i.
        """
        x, device = self._x, self._x.device
        if index is not None and index.shape[1] > 1:
            drawn = self._sampling.draw(self._ids, index.shape[1] * x.shape[2], device)
            return at_positions(x, drawn, self._sampling.placed(index, device))
        if self._few is None:
            self._few = at_positions(x, self._sampling.draw(self._ids, x.shape[2], device))
        return self._of(self._few, units, index)

    def mean(self, units: int, index: Tensor | None) -> Tensor:
        """The mean of every unit's map, (N, U, 1) float32."""
        if index is not None and index.shape[1] > 1:
            return self.whole(units, index).mean(2, keepdim=True, dtype=torch.float32)
        if self._mean is None:
            self._mean = self._x.mean(2, keepdim=True, dtype=torch.float32)
        return self._of(self._mean, units, index)

    def whole(self, units: int, index: Tensor | None) -> Tensor:
        """All positions of every unit, (N, U, width P)."""
        return self._of(self._x, units, index)

    def _of(self, x: Tensor, units: int, index: Tensor | None) -> Tensor:
        if index is None:
            return x if units == x.shape[1] else x[:, :units]
        return x.index_select(1, self._sampling.placed(index, x.device).flatten()).reshape(len(x), units, -1)
