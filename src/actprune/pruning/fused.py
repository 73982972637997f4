"""Read all places of a network together on a GPU, where each call costs more than what it reads.

During the first batch every place is tried out: what it was given must still be as it was when the batch is over, that is,
nobody may write to it in place meanwhile; a copy is read if it is not. From then on a place only keeps what it is given, until
the batch ends or what is kept becomes much, and one kernel (``statistics.kernels``) reads all of it. Where there is room, it is
kept for several batches, once some have shown that a place is not given the same memory again. What was read waits (``layout``)
for many batches.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import torch
from torch import Tensor

from actprune.core.hooks import Ear
from actprune.core.tensors import sent
from actprune.pruning.compiled import kernels
from actprune.pruning.kept import Chunk, Place, Proof
from actprune.pruning.layout import Layout
from actprune.pruning.reads import Reads
from actprune.pruning.sampling import Sampling
from actprune.pruning.tried import Trial, Trials
from actprune.pruning.updates import Company, Updates

_LOG = logging.getLogger(__name__)

_KEPT = 32
"""Activations are kept until they are this part of the device's memory; in the first batch, there are copies as well."""
_FREE = 4
"""Of more than one batch is kept what fits into this part of the memory that is free."""
_OFF, _BARE, _COUNTED = "each place reads", "each place keeps", "each place keeps, and how often that was written to"

_WRITTEN = (
    "%s: what it reads is written to in place afterwards, in batch %d and not in the first one; that batch is left out there, "
    "and from now on every layer is read at once, which takes longer"
)


class Fused:
    """The places of a network that are read together.

    Args:
        sampling: what is drawn.
        updates: knows the number of the batch, and takes what was read.
        alone: reads one place by itself.
        again: inside it, samples and number of an earlier batch are those of what is read.
    """

    def __init__(
        self,
        sampling: Sampling,
        updates: Updates,
        alone: Callable[[Reads, Tensor], None],
        again: Callable[[Tensor, int], AbstractContextManager[None]],
    ) -> None:
        self._sampling, self._updates, self._alone, self._again = sampling, updates, alone, again
        self._kernels: Any = None
        self._device = torch.device("cpu")
        self._ears: Mapping[int, Ear] = {}
        self._trials = Trials()
        self._refused: set[int] = set()
        self._chunks: list[Chunk] = []
        self._layout: Layout | None = None
        self._together: set[int] = set()
        self._others: list[Reads] | None = None
        self._ids: list[Tensor] = []
        self._batches: list[int] = []
        self._row = self._most = 0
        self._now: Tensor | None = None
        self._group: list[tuple[Tensor, int]] = []
        """Samples and number of each batch of which everything is kept, to be read at once."""
        self._proof = Proof(0)
        self._how, self._is_first, self._gives_up = _OFF, True, False
        updates.others.append(self._drained)

    def listen(self, ears: Mapping[int, Ear]) -> None:
        """Say who hears what a place is given: identity of its reads -> ear; for those that hear for nobody else."""
        self._ears, self._how = ears, _OFF
        for chunk in self._chunks:
            for place in chunk.places:
                place.ear = ears[id(place.reads)]
                place.alone = place.ear.watcher

    def others(self, reads: Iterable[Reads]) -> list[Reads]:
        """Of these, those that are read by themselves; the same ones are asked about each time."""
        if self._others is None:
            self._others = [each for each in reads if id(each) not in self._together]
        return self._others

    def begin(self, ids: Tensor | None) -> None:
        """A batch comes, with these samples, (N,) on the CPU; None where it has rows that do not count."""
        if self._layout is not None and ids is not None:
            if self._group and len(ids) != len(self._group[0][0]):
                self._read_group()
            if self._row + (len(self._group) + 1) * len(ids) > self._layout.rows:
                self._updates.flush()
            if len(ids) > self._most:
                ids = None
        self._now = ids
        self._turn(_OFF if ids is None else _BARE if torch.is_inference_mode_enabled() else _COUNTED)

    def end(self) -> None:
        """The batch is over."""
        ids, self._now = self._now, None
        if ids is None:
            return
        if self._is_first:
            self._set_up(ids)
        elif self._layout is not None:
            n = len(self._group)
            if all(chunk.holds(0 if chunk.is_read else n + 1) for chunk in self._chunks):
                self._group.append((ids, self._updates.batch))
                if n + 1 >= self._proof.at_once(len(ids)):
                    self._read_group()
            else:
                self._read_group()
                self._apart(ids, self._layout)
            if self._gives_up:
                self._updates.flush()
                self._chunks, self._layout, self._together, self._others = [], None, set(), None

    def stop(self) -> None:
        """What comes now is not part of the batch."""
        self.end()
        self._read_group()
        self._proof.begin_again()
        self._turn(_OFF)

    def drop(self) -> None:
        """The batch broke off: hold nothing of it."""
        self._now = None
        self._trials.clear()
        self._refused.clear()
        self._chunks = [] if self._is_first else self._chunks
        for chunk in self._chunks:
            chunk.is_read = False
            chunk.forget(slice(len(self._group), None))
        self._proof.begin_again()
        self._turn(_OFF)

    def _turn(self, how: str) -> None:
        if self._how == how or self._layout is None:
            return
        if how != _OFF:
            self._read_group()
        self._how = how
        for place in (place for chunk in self._chunks for place in chunk.places):
            place.ear.watcher = place.alone if how == _OFF else self._keeps(place)
        for chunk in self._chunks if how != _OFF else ():
            chunk.places[0].ear.watcher = partial(self._first, chunk.places[0])
        for chunk in self._chunks[:-1] if how != _OFF else ():
            chunk.places[-1].ear.watcher = partial(self._last, chunk)

    def _keeps(self, place: Place) -> Callable[[Tensor], object]:
        return place.seen.append if self._how == _BARE else place.keep

    # the first batch

    def tries(self, reads: Reads, x: Tensor, is_usual: bool) -> bool:
        """Whether a place that is given x in the first batch is read when that is over.

        ``is_usual``: x has one row per sample, and its channels next.
        """
        if not self._is_first or self._now is None:
            return False
        ear, before = self._ears.get(id(reads)), self._trials.withdraw(reads)
        if before is not None:  # called twice
            self._refused.add(id(reads))
            self._alone(reads, before)
        if ear is None or not is_usual or id(reads) in self._refused or type(x) is not Tensor or not x.is_contiguous():
            return False  # what a subclass shows need not lie in its memory
        if self._kernels is None:
            self._kernels, self._device = kernels(x.device), x.device
            self._is_first = self._kernels is not None
        if x.device != self._device or self._kernels is None or x.dtype not in self._kernels.TYPES:
            return False
        hands = reads.together(x)
        if hands is None:
            return False
        self._trials.add(Place(reads, ear, ear.watcher, tuple(x.shape[1:]), x.dtype, hands), x)
        if self._trials.kept > _memory(self._device) // _KEPT:
            self._close()
        return True

    def _close(self) -> None:
        """Read what was tried out so far place by place, and make a chunk of it."""
        same, changed = self._trials.over(self._kernels, self._device)
        for trial in (*same, *changed):
            self._refused.add(id(trial.place.reads))
            self._alone(trial.place.reads, trial.copy)
        if same:
            self._chunks.append(Chunk([trial.place for trial in same]))

    def _is_once(self, place: Place) -> bool:
        return all(self._updates.waits_once(hand.parts) for hand in place.hands)

    def _set_up(self, ids: Tensor) -> None:
        """Lay out what is read from now on, and read this batch, or move what was read of it there."""
        if not self._trials.kept and not self._chunks:
            return
        self._is_first = False
        same: list[Trial] = []
        if self._chunks:
            self._close()
            once = ([place for place in chunk.places if self._is_once(place)] for chunk in self._chunks)
            self._chunks = [Chunk(places) for places in once if places]
        else:
            same, changed = self._trials.over(self._kernels, self._device)
            for trial in changed:
                self._alone(trial.place.reads, trial.copy)
            self._chunks = [Chunk([trial.place for trial in same])] if same else []
        layout = Layout(self._chunks, self._kernels, self._sampling.k, self._updates.kind, self._device, _memory(self._device))
        if layout.rows < len(ids):
            for trial in same:
                self._alone(trial.place.reads, trial.copy)
            return
        # of more samples, more would be kept
        largest = max(sum(math.prod(place.shape) * place.dtype.itemsize for place in chunk.places) for chunk in self._chunks)
        room = _memory(self._device) // _KEPT // max(1, largest)
        self._most = min(layout.rows, max(len(ids), room))
        self._layout, self._others = layout, None
        self._together = {id(place.reads) for chunk in self._chunks for place in chunk.places}
        if same:
            for trial in same:
                trial.place.seen.append(trial.copy)
            self._group = [(ids, self._updates.batch)]
            self._read_group()
        else:
            layout.fill(lambda hand: self._updates.withdraw(hand.parts), len(ids), self._halves(ids))
            self._waits(ids, self._updates.batch)
        self._proof = Proof(min(room, _free(self._device) // _FREE // max(1, largest)) if len(self._chunks) == 1 else 0)

    # every other batch

    def _first(self, place: Place, x: Tensor) -> None:
        """The first place of a chunk was reached; in a batch of maps of another size, nothing is kept."""
        if x.shape[1:] != place.shape:
            self._turn(_OFF)
            place.alone(x)
            return
        if self._how == _BARE and not torch.is_inference_mode_enabled():
            self._turn(_COUNTED)
        self._keeps(place)(x)

    def _last(self, chunk: Chunk, x: Tensor) -> None:
        """The last place of a chunk was reached, of which no more is to be kept."""
        self._keeps(chunk.places[-1])(x)
        if self._now is None or self._layout is None or chunk.is_read:
            return
        if not self._read(chunk, [self._now], self._layout):
            self._each(chunk)

    def _read_group(self) -> None:
        """Read what all places kept of whole batches."""
        group, self._group, layout = self._group, [], self._layout
        if not group or layout is None:
            return
        ids = [each for each, _ in group]
        if all(chunk.is_read or self._read(chunk, ids, layout) for chunk in self._chunks):
            for each, number in group:
                self._waits(each, number)
        else:
            self._proof.begin_again()
            for each, number in group:
                with self._again(each, number):
                    self._apart(each, layout, 1)
        for chunk in self._chunks:
            chunk.is_read = False

    def _read(self, chunk: Chunk, ids: list[Tensor], layout: Layout) -> bool:
        """Read what a chunk's places kept first, of some batches, if that is as it was in the very first batch."""
        n_samples, n_batches = len(ids[0]), len(ids)
        addresses = chunk.given(n_samples, n_batches, self._device)
        if addresses is None:
            return False
        layout.read(chunk, addresses, ids, self._row, self._sampling.is_halved)
        self._proof.add(chunk, n_samples)
        chunk.forget(slice(n_batches))
        chunk.is_read = True
        return True

    def _apart(self, ids: Tensor, layout: Layout, n: int | None = None) -> None:
        """Some places were reached otherwise than in the first batch: hand over a batch of all places by itself.

        ``n``: how many of the things that each place keeps are that batch's; None: all.
        """
        every, rows = self._sampling.on(self._device, ids), self._halves(ids)
        few = every if rows is None else every[rows]
        for chunk in self._chunks:
            self._each(chunk, n)
            for place in chunk.places:
                for hand in place.hands if chunk.is_read else ():
                    x = layout.at(place, hand, self._row, len(ids))
                    halved = hand.how == "few" and rows is not None
                    self._updates.add(hand.parts, x[rows] if halved else x.clone(), few if halved else every)
            chunk.is_read &= n is not None

    def _each(self, chunk: Chunk, n: int | None = None) -> None:
        """Read by themselves the first n things that each of a chunk's places keeps, which were not written to; None: all."""
        for place in chunk.places:
            seen, written = place.seen[:n], place.written(n or 0)
            del place.seen[:n], place.writes[:n]
            if written & set(range(len(seen))):
                self._gives_up = True
                _LOG.warning(_WRITTEN, place.reads.module, self._updates.batch)
                continue
            for x in seen:
                self._alone(place.reads, x)

    def _halves(self, ids: Tensor) -> Tensor | None:
        """On the device, the rows that are read where positions are drawn; None: all."""
        return sent(self._sampling.halves(ids), self._device) if self._sampling.is_halved else None

    def _waits(self, ids: Tensor, number: int) -> None:
        self._row += len(ids)
        self._ids.append(ids)
        self._batches.append(number)

    def _drained(self) -> Iterator[Company]:
        """Everything that waits."""
        self.stop()
        if self._layout is None or not self._row:
            return
        ids, numbers, sizes = torch.cat(self._ids), self._batches, [len(each) for each in self._ids]
        self._ids, self._batches, self._row = [], [], 0
        halved = None
        if self._sampling.is_halved:
            read = self._sampling.halves(ids)
            ends = torch.tensor(sizes, device="cpu").cumsum(0)
            counted = torch.bucketize(read, ends, right=True).bincount(minlength=len(sizes)).tolist()
            halved = (sent(read, self._device), counted)
        yield from self._layout.companies(len(ids), sent(ids, self._device), sizes, numbers, halved)


def _memory(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else 1 << 33


def _free(device: torch.device) -> int:
    """Bytes of a device's memory that this process may have."""
    if device.type != "cuda":
        return 1 << 33
    return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
