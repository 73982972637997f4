"""Where what is read of all places of a network lies until it is counted: one tensor, and who takes what of it.

What is read in the same way, few positions of large maps, all of small ones or means, lies side by side as (rows, units, k),
one row per sample; so one kernel writes it, and it is counted as it lies.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from actprune.core.tensors import listed, sent
from actprune.pruning.kept import Chunk, Place
from actprune.pruning.reads import Hand
from actprune.pruning.updates import Company, Part

WAITING = 1 << 29
"""Bytes of what was read that wait at most; counting takes several times that."""
_SHARE = 128
"""Of the device's memory, they are no more than this part."""
_ROWS = 1 << 17
"""Samples that wait at most: of each, statistics draw random signs when it is counted, however narrow the network."""
_SENT = 64
"""Batches whose addresses are kept at most."""
_INT32 = 1 << 31
_BYTES = 4


@dataclass
class _Region:
    """What is read in one way: (rows, units, k)."""

    how: str
    k: int
    units: int = 0
    base: int = 0
    """Where it begins in the common tensor."""
    hands: list[Hand] = field(default_factory=list)
    """In the order of their columns."""
    parts: list[tuple[Part, int]] = field(default_factory=list)
    """Who takes what, and where the channels of their place begin."""
    companies: list[tuple[list[Part], int]] = field(default_factory=list)
    """Parts that are updated together, and which of ``orders`` their units are in."""
    orders: list[Tensor | None] = field(default_factory=list)
    """(U,) columns, None where these are all there are, in order."""


class Layout:
    """The common tensor.

    Args:
        chunks: places; gain their launches.
        kernels: ``statistics.kernels``.
        k: positions that are drawn of a large map.
        kind: the same for parts that can be updated together.
        device: where the activations are.
        memory: of the device, in bytes.
    """

    def __init__(
        self,
        chunks: Sequence[Chunk],
        kernels: ModuleType,
        k: int,
        kind: Callable[[Part], tuple[object, ...]],
        device: torch.device,
        memory: int,
    ) -> None:
        self._kernels, self._device = kernels, device
        self._regions: dict[tuple[str, int], _Region] = {}
        self._columns: dict[int, tuple[_Region, int]] = {}
        self._sent: dict[tuple[Any, ...], Tensor] = {}
        places = [place for chunk in chunks for place in chunk.places]
        for place in places:
            for hand in place.hands:
                width = {"few": k, "mean": 1}.get(hand.how, place.space)
                region = self._regions.setdefault((hand.how, width), _Region(hand.how, width))
                self._columns[id(hand)] = (region, region.units)
                region.hands.append(hand)
                region.parts += [(part, region.units) for part in hand.parts]
                region.units += place.shape[0]
        self.per_row = sum(region.units * region.k for region in self._regions.values())
        """Elements of one sample."""
        fits = all(math.prod(place.shape) * k < _INT32 for place in places)
        self.rows = min(_ROWS, min(WAITING, memory // _SHARE) // _BYTES // self.per_row) if places and fits else 0
        """Samples that it holds; 0 where nothing can be read so."""
        self.out: Tensor = torch.empty(0, device="cpu")
        """All regions, one after the other."""
        if not self.rows:
            return
        self.hold()
        with torch.inference_mode(False):
            base = 0
            for region in self._regions.values():
                region.base = base
                base += self.rows * region.units * region.k
                self._company(region, kind)
        for chunk in chunks:
            chunk.launches = list(self._launches(chunk))

    def hold(self) -> None:
        """Have memory for all rows."""
        if not self.out.numel():
            with torch.inference_mode(False):
                self.out = torch.empty(self.rows * self.per_row, dtype=torch.float32, device=self._device)

    def release(self) -> None:
        """Hold none; nothing may wait there."""
        self.out = torch.empty(0, device="cpu")

    def _company(self, region: _Region, kind: Callable[[Part], tuple[object, ...]]) -> None:
        piles: dict[tuple[object, ...], list[tuple[Part, int]]] = defaultdict(list)
        for part, start in region.parts:
            piles[kind(part)].append((part, start))
        orders = [torch.arange(region.units, device="cpu")]
        for pile in piles.values():
            columns = torch.cat([start + part.positions for part, start in pile])
            number = next((at for at, order in enumerate(orders) if torch.equal(order, columns)), len(orders))
            orders += [columns] if number == len(orders) else []
            region.companies.append(([part for part, _ in pile], number))
        region.orders = [None, *(sent(order, self._device) for order in orders[1:])]

    def _launches(self, chunk: Chunk) -> Iterator[Any]:
        kernels = self._kernels
        hows = {"few": kernels.DRAWN, "mean": kernels.MEAN, "all": kernels.ALL}
        found = defaultdict(list)
        for at, place in enumerate(chunk.places):
            for hand in place.hands:
                region, column = self._columns[id(hand)]
                found[place.dtype].append(
                    kernels.Source(at, place.shape[0], place.space, region.k, hows[hand.how], column, region.units, region.base)
                )
        for dtype, sources in found.items():
            yield kernels.launched(sources, dtype, self._device)

    def read(self, chunk: Chunk, addresses: list[int], ids: Tensor | range, row: int, halved: bool) -> None:
        """Read what a chunk's places were given, and write it to rows from ``row`` on.

        Args:
            chunk: of places.
            addresses: where that lies, of each place.
            ids: (N,) of the samples, on the CPU.
            row: that of the first sample.
            halved: whether only every second sample is read where positions are drawn.
        """
        told = ids if isinstance(ids, range) and self._kernels.takes(ids) else None
        heads = self._heads(addresses, listed(ids) if told is None else None)
        for launch in chunk.launches:
            self._kernels.read(launch, heads, self.out, row, len(ids), told, halved)

    def _heads(self, addresses: list[int], ids: Tensor | None) -> Tensor:
        """What a kernel is told of a batch, on the device; the host does not wait for the copy.

        An allocator gives a batch the memory that one before it had, so addresses that were sent once come again.
        """
        if ids is not None:
            return sent(torch.cat([torch.tensor(addresses, device="cpu"), ids]), self._device)
        stream = torch.cuda.current_stream(self._device).cuda_stream if self._device.type == "cuda" else None
        key = (stream, *addresses)
        known = self._sent.get(key)
        if known is None:
            if len(self._sent) >= _SENT:
                self._sent.clear()
            known = self._sent[key] = sent(torch.tensor(addresses, device="cpu"), self._device)
        return known

    def at(self, place: Place, hand: Hand, row: int, n_samples: int) -> Tensor:
        """What was read of a place for some rows, (n_samples, C, k): a view."""
        region, column = self._columns[id(hand)]
        return self._whole(region)[row : row + n_samples, column : column + place.shape[0]]

    def _whole(self, region: _Region) -> Tensor:
        size = self.rows * region.units * region.k
        return self.out[region.base : region.base + size].view(self.rows, region.units, region.k)

    def fill(self, read: Callable[[Hand], Tensor], n_samples: int, halved: Tensor | None) -> None:
        """Take over what each hand read of the first samples, (n, C, k); ``halved``: which rows, where positions are drawn."""
        for region in self._regions.values():
            x, there = torch.cat([read(hand) for hand in region.hands], 1), self._whole(region)[:n_samples]
            if region.how == "few" and halved is not None:
                there.index_copy_(0, halved, x.float())
            else:
                there.copy_(x)

    def companies(
        self,
        n_rows: int,
        ids: Tensor,  # (n_rows,) on the device
        sizes: list[int],
        numbers: list[int],
        halved: tuple[Tensor, list[int]] | None,
    ) -> Iterator[Company]:
        """What is counted together, of the first rows.

        Args:
            n_rows: how many there are.
            ids: of their samples.
            sizes: of the batches.
            numbers: of the batches.
            halved: the rows that were read where positions are drawn, on the device, and how many each batch has; None: all.
        """
        for region in self._regions.values():
            x, there, counted = self._whole(region)[:n_rows], ids, sizes
            if region.how == "few" and halved is not None:
                rows, counted = halved
                x, there = x.index_select(0, rows), ids.index_select(0, rows)
            ordered = [x if order is None else x.index_select(1, order) for order in region.orders]
            for parts, number in region.companies:
                yield Company(parts, ordered[number], there, counted, numbers)
