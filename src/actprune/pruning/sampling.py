"""What all sites of a batch share: the samples' ids where the activations are, and what is drawn of each sample."""

from __future__ import annotations

import torch
from torch import Tensor

from actprune.core.tensors import sent
from actprune.pruning.lies import Lies
from actprune.statistics import Density, every_second, position_bits, sample_positions

Drawn = tuple[Tensor, Tensor, Tensor]
"""Where the activations are: which rows of a batch are read, (n, 1), their ids, (n,), and their positions, (n, k)."""


class Sampling:
    """Draws and copies once per batch; nothing waits for a device.

    Args:
        density: how much is read.
    """

    def __init__(self, density: Density) -> None:
        self._density = density
        self._maps: dict[tuple[int, int, torch.device], Tensor] = {}
        self.next_batch()

    def next_batch(self) -> None:
        """Forget the batch before; what is kept is known by the identity of its ids, which lives as long."""
        self._rows: dict[int, tuple[Tensor, Tensor, Tensor]] = {}
        self._drawn: dict[tuple[int, int, torch.device], Drawn] = {}
        self._there: dict[tuple[int, torch.device], tuple[Tensor, Tensor]] = {}
        self._flat: dict[tuple[tuple[int, int, int], int, int, torch.device], Tensor] = {}
        self._firsts: dict[tuple[int, int, int, torch.device], Tensor] = {}
        self._numbers: dict[tuple[int, int], Tensor] = {}

    @property
    def is_halved(self) -> bool:
        """Whether only every second sample is read where positions are drawn."""
        return self._density.halved

    @property
    def k(self) -> int:
        """How many positions are drawn; 1 where none are."""
        return self._density.positions or 1

    def how(self, seen: int) -> str:
        """Of so many positions, ``few`` are seen, or ``all``, which are no more than those; ``whole``: all, however many."""
        if self._density.positions is None:
            return "whole"
        return "few" if self._density.positions < seen else "all"

    def draw(self, ids: Tensor, seen: int, device: torch.device) -> Drawn:
        """Rows and positions that are read; drawn once per batch for all maps of one size."""
        known = self._drawn.get((id(ids), seen, device))
        if known is None:
            # where the ids are: a draw is many small operations, for a device more work than its copy
            rows, read, bits = self._read(ids)
            k = self._density.positions
            assert k is not None
            drawn = sample_positions(read, seen, k, seed=0, bits=bits)
            known = (self.on(device, rows), self.on(device, read), drawn.to(device, non_blocking=True))
            self._drawn[id(ids), seen, device] = known
        return known

    def flat(self, ids: Tensor, lie: Lies) -> Tensor:
        """Where what is read of (N, C, P) activations lies in memory, from their first element on, (n, C, k)."""
        known = self._flat.get((lie.steps, lie.channels, lie.positions, lie.device))
        if known is None:
            apart = (lie.channels, lie.steps[1], lie.device)
            if apart not in self._maps:
                maps = torch.arange(lie.channels, device="cpu") * lie.steps[1]
                self._maps[apart] = sent(maps.view(1, -1, 1), lie.device)
            known = self.firsts(ids, lie).unsqueeze(1) + self._maps[apart]
            self._flat[lie.steps, lie.channels, lie.positions, lie.device] = known
        return known

    def firsts(self, ids: Tensor, lie: Lies) -> Tensor:
        """The same of the first channel, (n, k)."""
        sample, _, position = lie.steps
        known = self._firsts.get((sample, position, lie.positions, lie.device))
        if known is None:
            rows, _, drawn = self.draw(ids, lie.positions, lie.device)
            known = self._firsts[sample, position, lie.positions, lie.device] = drawn * position + rows * sample
        return known

    def halves(self, ids: Tensor) -> Tensor:
        """The rows that are read where every second sample is, where the ids are."""
        return every_second(ids, seed=0)

    def rows(self, ids: Tensor) -> Tensor:
        """The rows that are read of a batch of which positions were drawn, where the ids are."""
        return self._read(ids)[0].squeeze(1)

    def _read(self, ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Rows that are read, (n, 1), their ids, and what positions are drawn from."""
        known = self._rows.get(id(ids))
        if known is None:
            # rows that are no samples may be too few to leave any out
            numbered = any(ids is numbers for numbers in self._numbers.values())
            halved = self._density.halved and not numbered
            rows = self.halves(ids) if halved else torch.arange(len(ids), device=ids.device)
            read = ids[rows] if halved else ids
            known = self._rows[id(ids)] = (rows.unsqueeze(1), read, position_bits(read, self._density.positions or 1, seed=0))
        return known

    def numbered(self, start: int, n: int) -> Tensor:
        """Ids from ``start`` on for rows that are no samples; the same tensor for reads of one batch that have as many."""
        if (start, n) not in self._numbers:
            self._numbers[start, n] = torch.arange(start, start + n, device="cpu")
        return self._numbers[start, n]

    def on(self, device: torch.device, ids: Tensor) -> Tensor:
        """The ids on a device, one copy per batch."""
        if ids.device == device:
            return ids
        known = self._there.get((id(ids), device))
        if known is None:
            with torch.inference_mode(False):
                known = self._there[id(ids), device] = (ids, ids.to(device, non_blocking=True))
        return known[1]
