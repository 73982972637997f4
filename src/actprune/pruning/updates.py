"""Keep what the places of a network read, and update statistics of many places and several batches with one call.

A network reads the same places in every batch, and in each batch a place costs a call or two, however few values it gives; so
reads wait, whole, until there are many, and only then are dealt out to the groups that were read there. What comes together the
first time becomes one statistic for good (see ``statistics.joined``); what comes in another company later is updated by itself.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from actprune.core.switches import GARBAGE
from actprune.core.tensors import sent
from actprune.core.views import Statistic
from actprune.pruning.arena import Arena
from actprune.pruning.settings import is_plain, settings
from actprune.statistics import Accumulator
from actprune.statistics.joined import join

Make = Callable[[int], Statistic | None]

AT_ONCE_ON_CPU = 1 << 16
"""Elements that one batch gives to a joined update, so that its intermediate results stay in the cache."""
AT_ONCE = 1 << 22
"""The same on a device, where a call costs more than its elements."""
HELD_ON_CPU, HELD = 1 << 23, 1 << 24
"""Elements of all reads that wait for later batches: 32 MiB of float32, 64 MiB on a device."""


class Part:
    """What one statistic takes of what a place reads.

    Args:
        key: the same for statistics that ``make`` makes.
        make: makes such a statistic for a number of units.
        statistic: what is updated.
        channels: (U,) where each unit is, on the CPU; None: unit i is channel i.
    """

    def __init__(self, key: str, make: Make, statistic: Statistic, channels: Tensor | None = None) -> None:
        self.key, self.make, self.statistic, self._channels = key, make, statistic, channels
        self._there = channels
        self.waits = isinstance(statistic, Accumulator) and statistic.joinable

    def of(self, x: Tensor) -> Tensor:
        """The units, (N, U, P), of x (N, C, P)."""
        if self._channels is None:
            units = self.statistic.n_units
            return x if x.shape[1] == units else x[:, :units]
        if self._there is None or self._there.device != x.device:
            self._there = sent(self._channels, x.device)
        return x.index_select(1, self._there)

    @property
    def positions(self) -> Tensor:
        """(U,) where each unit is, on the CPU."""
        return torch.arange(self.statistic.n_units, device="cpu") if self._channels is None else self._channels


_Read = tuple[Part, Tensor]
"""A part and what its place read."""


@dataclass
class Company:
    """What is updated together."""

    parts: list[Part]
    x: Tensor | list[Tensor]
    """(N, U, P) of all units, one part after the other, or what the place of each part read, (N, C, P)."""
    ids: Tensor
    """(N,) on x's device."""
    sizes: list[int]
    """Samples of each batch."""
    batches: list[int]
    """The batches' numbers."""

    def each(self) -> Sequence[Tensor]:
        """The units of every part, (N, U, P)."""
        if isinstance(self.x, Tensor):
            return self.x.split([part.statistic.n_units for part in self.parts], 1)
        return [part.of(x) for part, x in zip(self.parts, self.x, strict=True)]

    def together(self) -> Tensor:
        """The units of all parts, (N, U, P)."""
        if isinstance(self.x, Tensor):
            return self.x
        each = self.each()
        return each[0] if len(each) == 1 else torch.cat(list(each), 1)


@dataclass
class _Place:
    parts: Sequence[Part]
    kind: tuple[int, torch.dtype, torch.device]
    reads: list[Tensor]
    ids: list[Tensor]
    batches: list[int]


class Updates:
    """Updates that wait for their likes; ``flush`` makes them all."""

    def __init__(self) -> None:
        self._waiting: dict[int, _Place] = {}
        self.arena = Arena(HELD_ON_CPU)
        self._held = self._held_before = 0
        self.batch = 0
        self.others: list[Callable[[], Iterable[Company]]] = []
        """Who else keeps reads; called once all are to be counted, and no longer theirs then."""
        self._due: list[Company] = []
        self._wholes: dict[tuple[int, ...], Accumulator] = {}
        self._member: dict[int, tuple[int, ...]] = {}
        self._settings: dict[int, tuple[object, ...]] = {}
        self._of_any_size: dict[str, bool] = {}
        """By key of parts, whether settings do not depend on the number of units: only then may a whole have a part's."""

    def add(
        self,
        parts: Sequence[Part],
        x: Tensor,  # (N, C, P)
        ids: Tensor,  # (N,)
    ) -> None:
        """Update statistics, later.

        Args:
            parts: the statistics, all of which may wait; the same object whenever the place is read.
            x: what the place reads; a tensor of its own, which nobody changes.
            ids: on x's device, the same tensor for all reads of a batch.
        """
        place, kind = self._waiting.get(id(parts)), (x.shape[2], x.dtype, x.device)
        if place is not None and place.kind != kind:
            self._make()  # no more: what others keep may be in the middle of a batch
            place = None
        if place is None:
            place = self._waiting[id(parts)] = _Place(parts, kind, [], [], [])
        place.reads.append(x)
        place.ids.append(ids)
        place.batches.append(self.batch)
        self._held += x.numel()

    def update(self, part: Part, x: Tensor, ids: Tensor, labels: Tensor | None = None) -> None:
        """Update a statistic now, with what its place read, (N, C, P)."""
        if isinstance(part.statistic, Accumulator):
            part.statistic.update(part.of(x), ids, labels, batches=[self.batch])
        elif labels is None:
            part.statistic.update(part.of(x), ids)
        else:
            part.statistic.update(part.of(x), ids, labels)

    def withdraw(self, parts: Sequence[Part]) -> Tensor:
        """Take back what waits for these parts, the only thing."""
        place = self._waiting.pop(id(parts))
        self._held -= place.reads[0].numel()
        return place.reads[0]

    def waits_once(self, parts: Sequence[Part]) -> bool:
        """Whether something waits for these parts, once, and of this batch."""
        place = self._waiting.get(id(parts))
        return place is not None and place.batches == [self.batch]

    def kind(self, part: Part) -> tuple[object, ...]:
        """The same for parts that can be updated together."""
        known = self._settings.get(id(part.statistic))
        if known is None:
            own = settings(part.statistic)
            if part.key not in self._of_any_size:
                other = part.make(part.statistic.n_units + 1)
                self._of_any_size[part.key] = other is not None and settings(other) == own
            own = own if self._of_any_size[part.key] else (own, id(part.statistic))
            known = self._settings[id(part.statistic)] = (part.key, own)
        return known

    def batch_ends(self) -> None:
        """Nothing more comes of this batch, number ``batch``; what was got ready for it is over.

        What waits is made now, unless another batch like this would not be too much.
        """
        if self._held:
            on_cpu = next(iter(self._waiting.values())).reads[0].device.type == "cpu"
            if self.arena.is_full or 2 * self._held - self._held_before > (HELD_ON_CPU if on_cpu else HELD):
                self.flush()
        if not self._waiting and not self._due:
            self.arena.clear()
        self._held_before = self._held
        self.batch += 1

    def flush(self) -> None:
        """Make every update that waits."""
        with torch.inference_mode(False), torch.no_grad():
            for other in self.others:
                self._due += other()
        self._make()

    def _make(self) -> None:
        """Make the updates that wait here, and those that are due."""
        with torch.inference_mode(False), torch.no_grad(), GARBAGE.turned():
            waiting, self._waiting, self._held = list(self._waiting.values()), {}, 0
            self._due += self._companies(waiting)
            while self._due:  # each leaves before it is counted, so that nothing is counted twice after an error
                self._update(self._due.pop())

    def _companies(self, waiting: list[_Place]) -> Iterator[Company]:
        """What is updated together."""
        piles: dict[tuple[int, ...], dict[tuple[object, ...], list[_Read]]] = defaultdict(lambda: defaultdict(list))
        places: dict[tuple[int, ...], _Place] = {}
        while waiting:
            place = waiting.pop(0)
            rows = tuple(id(ids) for ids in place.ids)
            places[rows] = place
            x = _together(place.reads)
            for part in place.parts:
                piles[rows][(*self.kind(part), *place.kind)].append((part, x))
        for rows, of_kinds in piles.items():
            ids, sizes = _together(places[rows].ids), [len(each) for each in places[rows].ids]
            for pile in of_kinds.values():
                while pile:
                    n = self._company(pile, len(sizes))
                    parts, reads = [part for part, _ in pile[:n]], [x for _, x in pile[:n]]
                    yield Company(parts, reads, ids, sizes, places[rows].batches)
                    del pile[:n]

    def _company(self, pile: list[_Read], batches: int) -> int:
        """How many of a pile's first are updated together: as once they were, else until a batch gives ``AT_ONCE`` elements."""
        known = self._member.get(id(pile[0][0].statistic))
        if known is not None:
            return len(known)
        elements, seen = 0, set()
        for n, (part, x) in enumerate(pile):
            statistic = part.statistic
            if id(statistic) in seen or id(statistic) in self._member:
                return n
            if elements >= batches * (AT_ONCE_ON_CPU if x.device.type == "cpu" else AT_ONCE):
                return n
            seen.add(id(statistic))
            elements += len(x) * statistic.n_units * x.shape[2]
        return len(pile)

    def _update(self, company: Company) -> None:
        statistics: list[Accumulator] = [part.statistic for part in company.parts]  # type: ignore[misc]
        members, device = tuple(map(id, statistics)), company.ids.device
        whole = self._wholes.get(members)
        if whole is not None and whole.device != device:
            self._part(members)
            whole = None
        if whole is None and len(set(members)) == len(members) and not any(m in self._member for m in members):
            alone = len(members) == 1 and (statistics[0].device == device or not is_plain(statistics[0]))
            # a whole is made where it is to lie: a device would wait for states that are brought there
            whole = statistics[0].to(device) if alone else join(statistics, device)
            self._wholes[members] = whole
            self._member |= dict.fromkeys(members, members)
        if whole is not None:
            whole.update(company.together(), company.ids, None, company.sizes, company.batches)
            return
        for statistic, x in zip(statistics, company.each(), strict=True):
            known = self._member.get(id(statistic))
            if known is not None and statistic.device != device:
                self._part(known)
            statistic.update(x, company.ids, None, company.sizes, company.batches)

    def _part(self, members: tuple[int, ...]) -> None:
        """Forget a whole: its parts go on alone."""
        del self._wholes[members]
        for member in members:
            del self._member[member]


def _together(batches: list[Tensor]) -> Tensor:
    return batches[0] if len(batches) == 1 else torch.cat(batches)
