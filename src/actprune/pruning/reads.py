"""What one place of a network reads, and how the statistics of all groups that are read there get it.

Of large maps, most statistics get a few positions; some get the mean of each map, and some whole maps. What is made of a batch
is made once for all groups.

What the usual place reads is got ready before the batch, for all places in a row: between two layers nothing of this is in a
CPU's cache, and every call costs a multiple; on a device, what counts is that it is one call.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from actprune.compensation import Layer
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


_Kind = tuple[tuple[int, ...], torch.dtype, torch.device]
"""Shape, type and device of what is read."""
_Ready = tuple[list[Part], Tensor | None, Tensor | None, Tensor]
"""Who reads next; where in the activations, (n, C, k), None for means; where that is written, on a CPU; the rows' ids, (n,)."""


class Reads:
    """The groups that are read at one place, with their statistics, and the layers there whose mean inputs are folded.

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
        self.folded: list[tuple[Layer, Part]] = []
        self._make, self._sampling, self._updates = make, sampling, updates
        self._hands: dict[tuple[int, torch.device], list[_Hand]] = {}
        self._usual: tuple[_Kind, list[_Hand]] | None = None
        self._expected: _Kind | None = None
        self._ready: list[_Ready] = []

    @property
    def needs_labels(self) -> bool:
        """Whether any statistic takes the samples' classes."""
        return any(statistic.needs_labels for _, _, statistics in self.entries for _, statistic in statistics)

    def get_ready(self, ids: Tensor) -> None:
        """Expect what was read in the batch before, of these samples, (N,) on the CPU."""
        self._expected, self._ready = None, []
        if self._usual is None:
            return
        (shape, dtype, device), hands = self._usual
        channels, positions = shape[1], math.prod(shape[2:])
        for hand in hands:
            places, there = None, self._sampling.on(device, ids)
            if hand.how == "few":
                places = self._sampling.flat(ids, channels, positions, device)
                there = self._sampling.draw(ids, positions, device)[1]
            room = None
            if device.type == "cpu":
                size = (len(there), channels, 1 if places is None else places.shape[2])
                room = self._updates.arena.room(size, torch.float32 if places is None else dtype)
                if room is None:
                    return
            self._ready.append((hand.parts, places, room, there))
        self._expected = (len(ids), *shape[1:]), dtype, device

    def takes(self, x: Tensor) -> bool:
        """Hand x (N, C, *positions) to the statistics if it is what was expected, once."""
        if self._expected != (x.shape, x.dtype, x.device) or x.requires_grad or not x.is_contiguous():
            return False
        self._expected = None
        for layer, _ in self.folded:
            layer.space = tuple(x.shape[2:])
        for parts, places, room, ids in self._ready:
            if places is not None:
                read = torch.take(x, places, out=room)
            else:
                read = torch.mean(x.view(*x.shape[:2], -1), 2, keepdim=True, dtype=torch.float32, out=room)
            self._updates.add(parts, read, ids)
        return True

    def hand_over(self, x: Tensor, ids: Tensor, labels: Tensor | None = None, as_read: bool = False) -> None:
        """Hand one batch to the statistics.

        Args:
            x: (N, C, *positions) activations.
            ids: (N,) of the samples.
            labels: (N,) their classes, where ``needs_labels``.
            as_read: x lies as the place reads it, so that the next batch may be expected to lie so, too.
        """
        shape = tuple(x.shape)
        for layer, _ in self.folded:
            layer.space = tuple(shape[2:])
        x = x.flatten(2) if x.dim() > 3 else x if x.dim() == 3 else x.unsqueeze(2)
        hands = self._hands.get((x.shape[2], x.device))
        if hands is None:
            hands = self._hands[x.shape[2], x.device] = self._divided(x.shape[2], x.device)
        plain = as_read and x.is_contiguous()
        for hand in hands:
            given, there = self._made(hand, x, ids)
            plain &= hand.later and hand.channels is None and (hand.how == "mean" or given.numel() <= _READY)
            if hand.later:
                self._updates.add(hand.parts, given, there)
                continue
            of_rows = None
            if labels is not None and any(part.statistic.needs_labels for part in hand.parts):
                of_rows = labels if len(there) == len(ids) else labels[self._sampling.rows(ids).to(labels.device)]
            for part in hand.parts if len(there) else ():
                self._updates.update(part, given, there, of_rows if part.statistic.needs_labels else None)
        self._usual = ((shape, x.dtype, x.device), hands) if plain else None

    def _divided(self, space: int, device: torch.device) -> list[_Hand]:
        """Who gets what of maps of one size."""
        found: dict[tuple[object, ...], _Hand] = {}
        for site, index, statistics in self.entries:
            width, there = site.positions.shape[1], None if index is None else index.to(device)
            channels, of_units = (there, None) if width > 1 else (None, None if there is None else there.flatten())
            samples = self._sampling.samples(width * space)
            for key, statistic in statistics:
                how = "mean" if statistic.means_do else "few" if samples and not statistic.whole_maps else "whole"
                one = Part(key, self._make[key], statistic, of_units)
                # a view into what the network goes on with must not wait
                later = one.waits and not statistic.needs_labels and how != "whole"
                found.setdefault((how, later, id(channels)), _Hand(how, channels, [], later)).parts.append(one)
        for _, part in self.folded:
            found.setdefault(("mean", part.waits, id(None)), _Hand("mean", None, [], part.waits)).parts.append(part)
        return list(found.values())

    def _made(self, hand: _Hand, x: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
        """What is read, (n, C or U, P), and the ids of its rows, on its device."""
        channels = hand.channels
        if hand.how == "few" and channels is None:
            rows, there, drawn = self._sampling.draw(ids, x.shape[2], x.device)
            waits = hand.later and x.is_cpu and not x.requires_grad
            room = self._updates.arena.room((*drawn.shape, x.shape[1]), x.dtype) if waits else None
            return at_positions(x, drawn, None, rows, room), there
        if channels is not None:
            if hand.how == "few":
                rows, there, drawn = self._sampling.draw(ids, x.shape[2] * channels.shape[1], x.device)
                return at_positions(x, drawn, channels, rows), there
            x = x.index_select(1, channels.flatten()).reshape(len(x), len(channels), -1)
        if hand.how == "mean":
            x = x.mean(2, keepdim=True, dtype=torch.float32)
        return x, self._sampling.on(x.device, ids)
