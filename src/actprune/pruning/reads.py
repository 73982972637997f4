"""What one place of a network reads, and how the statistics of all groups that are read there get it.

Of large maps, most statistics get a few positions; some get the mean of each map, and some whole maps. What is made of a batch
is made once for all groups.

On a CPU, what the usual place reads is got ready before the batch, for all places in a row: between two layers nothing of this
is in the cache, and every call costs a multiple.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from actprune.core.views import Statistic
from actprune.graph import Site
from actprune.pruning.sampling import Sampling
from actprune.pruning.updates import Make, Part, Updates
from actprune.statistics import at_positions

Entry = tuple[Site, Tensor | None, list[tuple[str, Statistic]]]
"""A site, the channels of every unit there, (U, width), None where unit i is channel i; and what accumulates them, by key."""


_READY = 1 << 16
"""Elements up to which a read is got ready before the batch; with more, its own work outweighs the calls."""


@dataclass(frozen=True)
class _Hand:
    """What is handed over in one piece."""

    how: str
    """``few`` positions, the ``mean`` of each map, or ``whole`` maps."""
    channels: Tensor | None
    """(U, width) channels of every unit, where units have several."""
    parts: list[Part]
    later: bool
    """Whether all parts may wait."""


@dataclass(frozen=True)
class _Ready:
    """What the next batch is read with."""

    shape: tuple[int, ...]
    """Of what is read."""
    dtype: torch.dtype
    places: Tensor
    """(n, C, k) of its elements."""
    room: Tensor
    """Where they are written."""
    ids: Tensor
    """(n,) of the rows."""


class Reads:
    """The groups that are read at one place, with their statistics.

    Args:
        module: which reads.
        dim: of what it reads, that of the channels.
        make: key -> constructor of a statistic.
        sampling: draws rows and positions.
        updates: where reads wait.
    """

    def __init__(self, module: str, dim: int, make: Mapping[str, Make], sampling: Sampling, updates: Updates) -> None:
        self.module, self.dim = module, dim
        self.entries: list[Entry] = []
        self._make, self._sampling, self._updates = make, sampling, updates
        self._hands: dict[int, list[_Hand]] = {}
        self._usual: tuple[tuple[int, ...], torch.dtype, list[Part]] | None = None
        self._ready: _Ready | None = None

    @property
    def needs_labels(self) -> bool:
        """Whether any statistic takes the samples' classes."""
        return any(statistic.needs_labels for _, _, statistics in self.entries for _, statistic in statistics)

    def get_ready(self, ids: Tensor) -> None:
        """Expect what was read in the batch before, of these samples, (N,) on the CPU."""
        self._ready = None
        if self._usual is None:
            return
        shape, dtype, _ = self._usual
        places = self._sampling.flat(ids, shape[1], math.prod(shape[2:]))
        room = self._updates.arena.room((*places.shape,), dtype)
        if room is not None:
            read = self._sampling.draw(ids, math.prod(shape[2:]), ids.device)[1]
            self._ready = _Ready((len(ids), *shape[1:]), dtype, places, room, read)

    def takes(self, x: Tensor) -> bool:
        """Hand x (N, C, *positions) to the statistics if it is what was expected, once."""
        ready = self._ready
        if ready is None or x.shape != ready.shape or x.dtype != ready.dtype or x.requires_grad or not x.is_contiguous():
            return False
        self._ready = None
        assert self._usual is not None
        self._updates.add(self._usual[2], torch.take(x, ready.places, out=ready.room), ready.ids)
        return True

    def hand_over(self, x: Tensor, ids: Tensor, labels: Tensor | None = None, as_read: bool = False) -> None:
        """Hand one batch to the statistics.

        Args:
            x: (N, C, *positions) activations.
            ids: (N,) of the samples.
            labels: (N,) their classes, where ``needs_labels``.
            as_read: x lies as the place reads it, so that the next batch may be expected to lie so, too.
        """
        shape = x.shape
        x = x.flatten(2) if x.dim() > 3 else x if x.dim() == 3 else x.unsqueeze(2)
        hands = self._hands.get(x.shape[2])
        if hands is None:
            hands = self._hands[x.shape[2]] = self._divided(x.shape[2])
        self._usual = None
        for hand in hands:
            given, there = self._made(hand, x, ids)
            if hand.later:
                self._updates.add(hand.parts, given, there)
                if as_read and len(hands) == 1 and hand.how == "few" and hand.channels is None and x.is_cpu:
                    self._usual = (shape, x.dtype, hand.parts) if given.numel() <= _READY else None
                continue
            for part in hand.parts if len(there) else ():
                if not part.statistic.needs_labels:
                    part.statistic.update(part.of(given), there)
                elif labels is None or len(there) == len(ids):
                    part.statistic.update(part.of(given), there, labels)
                else:
                    part.statistic.update(part.of(given), there, labels[self._sampling.rows(ids).to(labels.device)])

    def _divided(self, space: int) -> list[_Hand]:
        """Who gets what of maps of one size."""
        found: dict[tuple[object, ...], _Hand] = {}
        for site, index, statistics in self.entries:
            width = site.positions.shape[1]
            channels, of_units = (index, None) if width > 1 else (None, None if index is None else index.flatten())
            samples = self._sampling.samples(width * space)
            for key, statistic in statistics:
                how = "mean" if statistic.means_do else "few" if samples and not statistic.whole_maps else "whole"
                one = Part(key, self._make[key], statistic, of_units)
                # a view into what the network goes on with must not wait
                later = one.waits and not statistic.needs_labels and how != "whole"
                found.setdefault((how, later, id(channels)), _Hand(how, channels, [], later)).parts.append(one)
        return list(found.values())

    def _made(self, hand: _Hand, x: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
        """What is read, (n, C or U, P), and the ids of its rows, on its device."""
        if hand.how == "few" and hand.channels is None:
            rows, there, drawn = self._sampling.draw(ids, x.shape[2], x.device)
            room = None
            if hand.later and not x.requires_grad:
                room = self._updates.arena.room((*drawn.shape, x.shape[1]), x.dtype) if x.is_cpu else None
            return at_positions(x, drawn, None, rows, room), there
        if hand.channels is not None:
            channels = self._sampling.placed(hand.channels, x.device)
            if hand.how == "few":
                rows, there, drawn = self._sampling.draw(ids, x.shape[2] * channels.shape[1], x.device)
                return at_positions(x, drawn, channels, rows), there
            x = x.index_select(1, channels.flatten()).reshape(len(x), len(channels), -1)
        if hand.how == "mean":
            x = x.mean(2, keepdim=True, dtype=torch.float32)
        return x, self._sampling.on(x.device, ids)
