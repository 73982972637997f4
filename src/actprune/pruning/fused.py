"""Read all places of a network together on a GPU, where each call costs more than what it reads.

During the first batch every place is tried out: what it was given must still be as it was when the batch is over, that is,
nobody may write to it in place meanwhile; a copy is read if it is not. From then on a place only keeps what it is given, until
the batch ends or what is kept becomes much, and one kernel (``statistics.kernels``) reads all of it. What was read waits
(``layout``) for many batches.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from actprune.core.hooks import Ear
from actprune.core.switches import GARBAGE
from actprune.core.tensors import listed, sent
from actprune.pruning.compiled import kernels
from actprune.pruning.first_batch import FirstBatch, Trial
from actprune.pruning.kept import Chunk, Place
from actprune.pruning.layout import Layout
from actprune.pruning.reads import Reads
from actprune.pruning.rows import Rows
from actprune.pruning.sampling import Sampling
from actprune.pruning.updates import Company, Updates

_LOG = logging.getLogger(__name__)

_KEPT = 32
"""Activations are kept until they are this part of the device's memory; in the first batch, there are copies as well."""
_WRITTEN = (
    "%s: what it reads is written to in place afterwards, in batch %d and not in the first one; that batch is left out there, "
    "and from now on every layer is read at once, which takes longer"
)


class Fused:
    """The places of a network that are read together.

    Args:
        sampling: what is drawn.
        rows: the samples of the batch.
        updates: knows the number of the batch, and takes what was read.
        alone: reads one place by itself.
    """

    def __init__(self, sampling: Sampling, rows: Rows, updates: Updates, alone: Callable[[Reads, Tensor], None]) -> None:
        self._sampling, self._rows, self._updates, self._alone = sampling, rows, updates, alone
        self._kernels: Any = None
        self._device = torch.device("cpu")
        self._ears: Mapping[int, Ear] = {}
        self._first_batch = FirstBatch()
        self._refused: set[int] = set()
        self._chunks: list[Chunk] = []
        self._layout: Layout | None = None
        self._together: set[int] = set()
        self._others: list[Reads] | None = None
        self._ids: list[Tensor | range] = []
        self._batches: list[int] = []
        self._row = self._most = 0
        self._now: Tensor | range | None = None
        self._watchers: dict[bool, list[tuple[Ear, Callable[[Tensor], object]]]] = {}
        self._is_first, self._is_on, self._gives_up = True, False, False
        updates.others.append(self._drained)

    def listen(self, ears: Mapping[int, Ear]) -> None:
        """Say who hears what a place is given: identity of its reads -> ear; for those that hear for nobody else."""
        self._ears, self._is_on = ears, False
        for place in (place for chunk in self._chunks for place in chunk.places):
            place.ear = ears[id(place.reads)]
            place.alone = place.ear.watcher
        if self._layout is not None:
            self._layout.hold()
        self._lay_out()

    def release(self) -> None:
        """Nothing more is heard, and nothing waits: hold no memory."""
        if self._layout is not None:
            self._layout.release()

    def others(self, reads: Iterable[Reads]) -> list[Reads]:
        """Of these, those that are read by themselves; the same ones are asked about each time."""
        if self._others is None:
            self._others = [each for each in reads if id(each) not in self._together]
        return self._others

    def begin(self) -> None:
        """A batch comes; one with rows that do not count is read place by place."""
        ids = None if self._rows.leaves_out else self._rows.numbers
        if self._layout is not None and ids is not None and self._row + len(ids) > self._layout.rows:
            self._updates.flush()
        if self._layout is not None and ids is not None and len(ids) > self._most:
            ids = None
        self._now = ids
        self._turn(on=ids is not None)

    def end(self) -> None:
        """The batch is over."""
        ids, self._now = self._now, None
        if ids is None:
            return
        if self._is_first:
            with GARBAGE.turned():
                self._set_up(ids)
        elif self._layout is not None:
            if all(chunk.is_empty if chunk.is_read else self._read(chunk, ids, self._layout) for chunk in self._chunks):
                self._waits(ids)
            else:
                self._apart(self._layout)
            for chunk in self._chunks:
                chunk.is_read = False
            if self._gives_up:
                self._updates.flush()
                self._chunks, self._layout, self._together, self._others = [], None, set(), None

    def stop(self) -> None:
        """What comes now is not part of the batch."""
        self.end()
        self._turn(on=False)

    def drop(self) -> None:
        """The batch broke off: hold nothing of it."""
        self._now = None
        self._first_batch.clear()
        self._refused.clear()
        self._chunks = [] if self._is_first else self._chunks
        for chunk in self._chunks:
            chunk.is_read = False
            chunk.clear()
        self._turn(on=False)

    def _lay_out(self) -> None:
        """Say once who hears what, as each batch turns it twice."""
        places = [place for chunk in self._chunks for place in chunk.places]
        kept: dict[int, Callable[[Tensor], object]] = {id(place): place.keep for place in places}
        kept |= {id(chunk.places[0]): partial(self._first, chunk.places[0]) for chunk in self._chunks}
        kept |= {id(chunk.places[-1]): partial(self._last, chunk) for chunk in self._chunks[:-1]}
        self._watchers = {
            False: [(place.ear, place.alone) for place in places],
            True: [(place.ear, kept[id(place)]) for place in places],
        }

    def _turn(self, on: bool) -> None:
        """Have places keep what they are given, or be read by themselves."""
        if on == self._is_on or self._layout is None:
            return
        self._is_on = on
        for ear, watcher in self._watchers[on]:
            ear.watcher = watcher

    # the first batch

    def tries(self, reads: Reads, x: Tensor, is_usual: bool) -> bool:
        """Whether a place that is given x in the first batch is read when that is over.

        ``is_usual``: x has one row per sample, and its channels next.
        """
        if not self._is_first or self._now is None:
            return False
        ear, before = self._ears.get(id(reads)), self._first_batch.withdraw(reads)
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
        self._first_batch.add(Place(reads, ear, ear.watcher, tuple(x.shape[1:]), x.dtype, hands), x)
        if self._first_batch.kept > _memory(self._device) // _KEPT:
            self._close()
        return True

    def _close(self) -> None:
        """Read what was tried out so far place by place, and make a chunk of it."""
        same, changed = self._first_batch.over(self._kernels, self._device)
        for trial in (*same, *changed):
            self._refused.add(id(trial.place.reads))
            self._alone(trial.place.reads, trial.copy)
        if same:
            self._chunks.append(Chunk([trial.place for trial in same]))

    def _is_once(self, place: Place) -> bool:
        return all(self._updates.waits_once(hand.parts) for hand in place.hands)

    def _set_up(self, ids: Tensor | range) -> None:
        """Lay out what is read from now on, and read this batch, or move what was read of it there."""
        if not self._first_batch.kept and not self._chunks:
            return
        self._is_first = False
        same: list[Trial] = []
        if self._chunks:
            self._close()
            once = ([place for place in chunk.places if self._is_once(place)] for chunk in self._chunks)
            self._chunks = [Chunk(places) for places in once if places]
        else:
            same, changed = self._first_batch.over(self._kernels, self._device)
            for trial in changed:
                self._alone(trial.place.reads, trial.copy)
            self._chunks = [Chunk([trial.place for trial in same])] if same else []
        layout = Layout(self._chunks, self._kernels, self._sampling.k, self._updates.kind, self._device, _memory(self._device))
        if layout.rows < len(ids):
            for trial in same:
                self._alone(trial.place.reads, trial.copy)
            self._chunks = []
            return
        # of more samples, more would be kept
        largest = max(sum(math.prod(place.shape) * place.dtype.itemsize for place in chunk.places) for chunk in self._chunks)
        self._most = min(layout.rows, max(len(ids), _memory(self._device) // _KEPT // max(1, largest)))
        self._layout, self._others = layout, None
        self._lay_out()
        for place in (place for chunk in self._chunks for place in chunk.places):
            self._together.add(id(place.reads))
            place.reads.expect_nothing()
        if same:
            layout.read(self._chunks[0], [trial.copy.data_ptr() for trial in same], ids, 0, self._sampling.is_halved)
        else:
            layout.fill(lambda hand: self._updates.withdraw(hand.parts), len(ids), self._halves())
        self._waits(ids)

    # every other batch

    def _first(self, place: Place, x: Tensor) -> None:
        """The first place of a chunk was reached; in a batch of maps of another size, nothing is kept."""
        if x.shape[1:] == place.shape:
            place.keep(x)
        else:
            self._turn(on=False)
            place.alone(x)

    def _last(self, chunk: Chunk, x: Tensor) -> None:
        """The last place of a chunk was reached, of which no more is to be kept."""
        chunk.places[-1].keep(x)
        if self._now is None or self._layout is None or chunk.is_read:
            return
        if not self._read(chunk, self._now, self._layout):
            self._each(chunk)

    def _read(self, chunk: Chunk, ids: Tensor | range, layout: Layout) -> bool:
        """Read what a chunk's places kept, if that is as it was in the first batch."""
        addresses = chunk.given(len(ids), self._device)
        if addresses is None:
            return False
        layout.read(chunk, addresses, ids, self._row, self._sampling.is_halved)
        chunk.clear()
        chunk.is_read = True
        return True

    def _apart(self, layout: Layout) -> None:
        """Some places were reached otherwise than in the first batch: this batch of all places is handed over by itself."""
        ids = self._rows.ids
        every, rows = self._sampling.on(self._device, ids), self._halves()
        few = every if rows is None else every[rows]
        read = []
        for place in (place for chunk in self._chunks if chunk.is_read for place in chunk.places):
            for hand in place.hands:
                x = layout.at(place, hand, self._row, len(ids))
                is_halved = hand.how == "few" and rows is not None
                read.append((hand.parts, x[rows] if is_halved else x.clone(), few if is_halved else every))
        for chunk in self._chunks:
            self._each(chunk)
        for parts, x, there in read:
            self._updates.add(parts, x, there)

    def _each(self, chunk: Chunk) -> None:
        """Read by themselves what a chunk's places keep, but for what was written to."""
        for place in chunk.places:
            seen, is_written = list(place.seen), place.is_written
            place.clear()
            if is_written:
                self._gives_up = True
                _LOG.warning(_WRITTEN, place.reads.module, self._updates.batch)
            for x in () if is_written else seen:
                self._alone(place.reads, x)

    def _halves(self) -> Tensor | None:
        """On the device, the rows that are read where positions are drawn; None: all."""
        return sent(self._sampling.halves(self._rows.ids), self._device) if self._sampling.is_halved else None

    def _waits(self, ids: Tensor | range) -> None:
        self._row += len(ids)
        self._ids.append(ids)
        self._batches.append(self._updates.batch)

    def _drained(self) -> Iterator[Company]:
        """Everything that waits."""
        self.stop()
        if self._layout is None or not self._row:
            return
        ids, numbers, sizes = torch.cat(list(map(listed, self._ids))), self._batches, [len(each) for each in self._ids]
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
