"""Collect what the sites of a network read, and update statistics of many sites and several batches with one call.

A network reads the same sites in every batch. What the first batch brought together becomes one statistic for good (see
``statistics.joined``); what comes in another company later is updated by itself. Batches wait for each other: adding to a
histogram costs a pass over its table, and every operation its call, however few values there are.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from actprune.core.views import Statistic
from actprune.pruning.settings import settings
from actprune.statistics import Accumulator
from actprune.statistics.joined import join

Make = Callable[[int], Statistic | None]

AT_ONCE_ON_CPU = 1 << 16
"""Elements that one batch gives to a joined update, so that its intermediate results stay in the cache."""
AT_ONCE = 1 << 22
"""The same on a device, where a call costs more than its elements."""
HELD_ON_CPU, HELD = 1 << 23, 1 << 24
"""Elements of all statistics that wait for later batches: 32 MiB of float32, 64 MiB on a device."""


@dataclass
class _Pile:
    make: Make
    ids: Tensor
    parts: list[tuple[Accumulator, Tensor]] = field(default_factory=list)
    elements: int = 0


class Updates:
    """Updates that wait for their likes; ``flush`` makes them all."""

    def __init__(self) -> None:
        self._piles: dict[tuple[object, ...], _Pile] = {}
        self._wholes: dict[tuple[int, ...], Accumulator] = {}
        self._member: dict[int, tuple[int, ...]] = {}
        self._settings: dict[int, tuple[object, ...]] = {}
        self._waiting: dict[tuple[int, ...], list[tuple[list[Tensor], Tensor]]] = {}
        self._held = 0
        self._joined_ids: tuple[list[Tensor], Tensor] | None = None

    def add(
        self,
        key: str,
        make: Make,
        statistic: Statistic,
        x: Tensor,  # (N, U, P)
        ids: Tensor,  # (N,)
    ) -> None:
        """Update a statistic, now or later.

        Args:
            key: the same for statistics that ``make`` makes.
            make: makes such a statistic for a number of units.
            statistic: what is updated.
            x: a tensor of its own, which nobody changes.
            ids: on x's device, the same tensor for all reads of a batch.
        """
        if not isinstance(statistic, Accumulator) or not statistic.joinable:
            statistic.update(x, ids)
            return
        if id(statistic) not in self._settings:
            self._settings[id(statistic)] = settings(statistic)
        group = (key, self._settings[id(statistic)], id(ids), x.shape[2], x.dtype, x.device)
        pile = self._piles.get(group)
        if pile is not None and any(statistic is other for other, _ in pile.parts):
            self._update(self._piles.pop(group))  # read twice in one batch: the others stay together
            pile = None
        if pile is None:
            pile = self._piles[group] = _Pile(make, ids)
        pile.parts.append((statistic, x))
        pile.elements += x.numel()
        company = self._member.get(id(pile.parts[0][0]))  # the same whatever the size of the batch
        if company is not None:
            full = len(pile.parts) == len(company)
        else:
            full = pile.elements >= (AT_ONCE_ON_CPU if x.device.type == "cpu" else AT_ONCE)
        if full:
            del self._piles[group]
            self._update(pile)

    def batch_ends(self) -> None:
        """Nothing more comes of this batch: what still waits for its likes waits no longer, but may for later batches."""
        while self._piles:
            self._update(self._piles.popitem()[1])

    def flush(self) -> None:
        """Make every update that waits."""
        self.batch_ends()
        self._catch_up()

    def _update(self, pile: _Pile) -> None:
        device = pile.parts[0][1].device
        members = tuple(id(statistic) for statistic, _ in pile.parts)
        whole = self._wholes.get(members)
        if whole is not None and whole.device != device:
            self._part(members)
            whole = None
        if whole is None and len(set(members)) == len(members) and not any(m in self._member for m in members):
            parts = [statistic for statistic, _ in pile.parts]
            whole = join(parts, pile.make, device) if len(parts) > 1 else parts[0].to(device)  # type: ignore[arg-type]
            self._wholes[members] = whole
            self._member |= dict.fromkeys(members, members)
        if whole is not None:
            self._wait(members, [x for _, x in pile.parts], pile.ids)
            return
        self._catch_up()
        for statistic, x in pile.parts:
            known = self._member.get(id(statistic))
            if known is not None and statistic.device != device:
                self._part(known)
            elif known is not None:
                statistic._update_count = self._wholes[known]._update_count
            statistic.update(x, pile.ids)
            if known is not None and known in self._wholes:
                self._wholes[known]._update_count = statistic._update_count

    def _wait(self, members: tuple[int, ...], parts: list[Tensor], ids: Tensor) -> None:
        """Keep what one batch brings to a whole."""
        before = self._waiting.setdefault(members, [])
        if before and (before[0][0][0].shape[2], before[0][0][0].dtype) != (parts[0].shape[2], parts[0].dtype):
            self._catch_up()
            before = self._waiting.setdefault(members, [])
        before.append((parts, ids))
        self._held += sum(x.numel() for x in parts)
        if self._held >= (HELD_ON_CPU if ids.device.type == "cpu" else HELD):
            self._catch_up()

    def _catch_up(self) -> None:
        """Update with everything that waits."""
        self._held = 0
        while self._waiting:  # each leaves before it is counted, so that nothing is counted twice after an error
            members, batches = self._waiting.popitem()
            with torch.inference_mode(False), torch.no_grad():
                x = torch.cat([torch.cat(parts, 1) for parts, _ in batches])
            ids = self._together([ids for _, ids in batches])
            self._wholes[members].update(x, ids, sizes=[len(ids) for _, ids in batches])
        self._joined_ids = None

    def _together(self, ids: list[Tensor]) -> Tensor:
        """Ids of several batches; the same tensor for all wholes that saw the same ones."""
        known = self._joined_ids
        if known is None or len(known[0]) != len(ids) or any(a is not b for a, b in zip(known[0], ids, strict=True)):
            with torch.inference_mode(False):
                known = self._joined_ids = (ids, torch.cat(ids))
        return known[1]

    def _part(self, members: tuple[int, ...]) -> None:
        """Forget a whole: its parts go on alone."""
        self._catch_up()
        del self._wholes[members]
        for member in members:
            del self._member[member]
