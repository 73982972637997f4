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
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from actprune.compensation import Layer
from actprune.core.tensors import sent
from actprune.core.views import Statistic
from actprune.graph import Site
from actprune.pruning.lies import Lies, Looks, lies
from actprune.pruning.sampling import Sampling
from actprune.pruning.updates import Make, Part, Updates
from actprune.statistics import at_positions

Entry = tuple[Site, Tensor | None, list[tuple[str, Statistic]]]
"""A site, the channels of every unit there, (U, width), None where unit i is channel i; and what accumulates them, by key."""


_READY = 1 << 16
"""Elements up to which a read is got ready before the batch; with more, its own work outweighs the calls."""


@dataclass(frozen=True)
class Hand:
    """What is handed over in one piece."""

    how: str
    """``few`` positions, ``all`` where there are no more than that, the ``mean`` of each map, ``whole`` maps of any size, or
    ``maps``, which keep their extents."""
    channels: Tensor | None
    """(U, width) channels of every unit, where units have several."""
    parts: list[Part]
    later: bool
    """Whether all parts may wait."""
    flattened: tuple[int, ...] = ()
    """Of ``maps`` of units with several channels, see ``Site``."""


class _Ready(NamedTuple):
    """What is known of a read before it comes."""

    hand: Hand
    places: Tensor | None
    """For ``few``, where in memory, (n, C, k)."""
    rows: Tensor | None
    """The same where channels lie in rows: where each row begins, (n * k,)."""
    room: Tensor | None
    """Where it is written, on a CPU."""
    ids: Tensor
    """(n,) of the samples."""


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
        self._hands: dict[tuple[int, torch.device], list[Hand]] = {}
        self.usual: tuple[Lies, list[Hand]] | None = None
        """How the last batch was read, where the next one may be expected to lie so, too."""
        self._expected: tuple[Looks, Lies] | None = None
        self._ready: list[_Ready] = []

    @property
    def needs_labels(self) -> bool:
        """Whether any statistic takes the samples' classes."""
        return any(statistic.needs_labels for _, _, statistics in self.entries for _, statistic in statistics)

    def get_ready(self, ids: Tensor | None) -> None:
        """Expect what was read in the batch before, of these samples, (N,) on the CPU; None: nothing like it."""
        self.expect_nothing()
        if ids is None or self.usual is None:
            return
        lie, hands = self.usual
        expected = lie.of(len(ids))
        if expected is None:
            return
        device, channels = expected.device, expected.channels
        for hand in hands:
            places = rows = None
            there, shape = self._sampling.on(device, ids), (len(ids), channels, expected.positions)
            if hand.how == "few":
                there = self._sampling.draw(ids, expected.positions, device)[1]
                n, k = len(there), self._sampling.k
                if expected.in_rows:
                    rows, shape = self._sampling.firsts(ids, expected).flatten(), (n, k, channels)
                else:
                    places, shape = self._sampling.flat(ids, expected), (n, channels, k)
            elif hand.how == "mean":
                shape = (len(ids), channels, 1)
            room = None
            if device.type == "cpu":
                room = self._updates.arena.room(shape, torch.float32 if hand.how == "mean" else expected.dtype)
                if room is None:
                    return
            self._ready.append(_Ready(hand, places, rows, room, there))
        self._expected = expected.looks, expected

    def expect_nothing(self) -> None:
        """Forget what was got ready."""
        self._expected, self._ready = None, []

    def takes(self, x: Tensor) -> bool:
        """Hand x to the statistics if it is what was expected, once."""
        if self._expected is None:
            return False
        looks, expected = self._expected
        if (x.shape, x.stride(), x.dtype, x.device) != looks or x.requires_grad:
            return False
        self._expected = None
        self._tell_layers(x)
        for ready in self._ready:  # few calls: see above
            room = ready.room
            if ready.places is not None:
                read = torch.take(x if expected.is_all else expected.flat(x), ready.places, out=room)
            elif ready.rows is not None:
                out = None if room is None else room.view(-1, expected.channels)
                rows = torch.index_select(expected.rows(x), 0, ready.rows, out=out)
                read = rows.view(len(ready.ids), -1, expected.channels).transpose(1, 2)
            elif ready.hand.how == "mean":
                read = torch.mean(expected.maps(x), 2, keepdim=True, dtype=torch.float32, out=room)
            else:
                maps = expected.maps(x)
                read = maps.clone() if room is None else room.copy_(maps)
            self._updates.add(ready.hand.parts, read, ready.ids)
        return True

    def together(self, x: Tensor) -> list[Hand] | None:
        """Who gets what of x (N, C, *positions), if all of it may wait, and be read with what other places read."""
        hands = self._hands_of(math.prod(x.shape[2:]), x.device)
        if not all(hand.later and hand.channels is None for hand in hands):
            return None
        self._tell_layers(x)
        return hands

    def _tell_layers(self, x: Tensor) -> None:
        """Say how large the maps are to the layers whose mean inputs are folded."""
        for layer, _ in self.folded:
            layer.sees(x)

    def _hands_of(self, space: int, device: torch.device) -> list[Hand]:
        """Who gets what of maps of one size; the same objects each time."""
        hands = self._hands.get((space, device))
        if hands is None:
            hands = self._hands[space, device] = self._divided(space, device)
        return hands

    def hand_over(
        self, x: Tensor, ids: Tensor, labels: Tensor | None = None, read: Tensor | None = None, several: bool = False
    ) -> None:
        """Hand one batch to the statistics.

        Args:
            x: (N, C, *positions) activations.
            ids: (N,) of the samples.
            labels: (N,) their classes, where ``needs_labels``.
            read: what the place was given, where the next batch may be expected to lie so, too.
            several: the last of the positions counts rows of a sample.
        """
        maps, plain = x, read is not None
        self._tell_layers(x)
        x = x.flatten(2) if x.dim() > 3 else x if x.dim() == 3 else x.unsqueeze(2)
        hands = self._hands_of(x.shape[2], x.device)
        for hand in hands:
            if hand.how == "maps":
                given, there = _maps(hand, maps, several), self._sampling.on(x.device, ids)
            else:
                given, there = self._made(hand, x, ids)
            little = hand.how == "mean" or given.numel() <= _READY or not x.is_cpu
            plain &= hand.later and hand.channels is None and little
            if hand.later:
                self._updates.add(hand.parts, given, there)
                continue
            of_rows = None
            if labels is not None and any(part.statistic.needs_labels for part in hand.parts):
                of_rows = labels if len(there) == len(ids) else labels[self._sampling.rows(ids).to(labels.device)]
            for part in hand.parts if len(there) else ():
                self._updates.update(part, given, there, of_rows if part.statistic.needs_labels else None)
        lie = lies(read, maps) if read is not None and plain else None
        self.usual = None if lie is None else (lie, hands)

    def _divided(self, space: int, device: torch.device) -> list[Hand]:
        """Who gets what of maps of one size."""
        found: dict[tuple[object, ...], Hand] = {}
        for site, index, statistics in self.entries:
            width = site.positions.shape[1]
            channels = None if width == 1 or index is None else sent(index, device)
            of_units = None if width > 1 or index is None else index.flatten()
            usual = self._sampling.how(width * space)
            for key, statistic in statistics:
                all_of_it = "maps" if statistic.takes_maps else "whole" if statistic.whole_maps else usual
                how = "mean" if statistic.means_do else all_of_it
                one = Part(key, self._make[key], statistic, of_units)
                # a view into what the network goes on with must not wait
                later = one.waits and not statistic.needs_labels and how not in ("whole", "maps")
                hand = Hand(how, channels, [], later, site.flattened)
                found.setdefault((how, later, id(channels)), hand).parts.append(one)
        for _, part in self.folded:
            found.setdefault(("mean", part.waits, id(None)), Hand("mean", None, [], part.waits)).parts.append(part)
        return list(found.values())

    def _made(self, hand: Hand, x: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
        """What is read, (n, C or U, P), and the ids of its rows, on its device."""
        channels, waits = hand.channels, hand.later and x.is_cpu and not x.requires_grad
        if hand.how == "few" and channels is None:
            rows, there, drawn = self._sampling.draw(ids, x.shape[2], x.device)
            room = self._updates.arena.room((*drawn.shape, x.shape[1]), x.dtype) if waits else None
            return at_positions(x, drawn, None, rows, room), there
        if channels is not None:
            if hand.how == "few":
                rows, there, drawn = self._sampling.draw(ids, x.shape[2] * channels.shape[1], x.device)
                return at_positions(x, drawn, channels, rows), there
            x = x.index_select(1, channels.flatten()).reshape(len(x), len(channels), -1)
        elif hand.how == "all":
            room = self._updates.arena.room((len(x), x.shape[1], x.shape[2]), x.dtype) if waits else None
            x = x.clone() if room is None else room.copy_(x)
        if hand.how == "mean":
            x = x.mean(2, keepdim=True, dtype=torch.float32)
        return x, self._sampling.on(x.device, ids)


def _maps(hand: Hand, x: Tensor, several: bool) -> Tensor:
    """(N, C or U, M, *extents): the maps of channels or units, of x (N, C, *extents), or (N, C, *extents, R) of R rows each."""
    x = x.movedim(-1, 2) if several else x.unsqueeze(2)
    if hand.channels is None:
        return x
    x = x.index_select(1, hand.channels.flatten()).unflatten(1, hand.channels.shape)
    if x.dim() == 4 and hand.flattened:  # (N, U, k, R)
        x = x.movedim(2, 3).unflatten(3, hand.flattened).movedim(3 + hand.flattened.index(-1), 3)
    return x.flatten(2, 3)


def is_identity(at: NDArray[np.int64]) -> bool:  # (n_units, k)
    """Whether unit i is position i."""
    return at.shape[1] == 1 and np.array_equal(at[:, 0], np.arange(len(at)))
