"""Read all places of a network together on a GPU, where each call costs more than what it reads.

During the first batch every place is read as it comes, and tried out: what it was given must still be as it was when the batch
is over, that is, nobody may write to it in place meanwhile. From then on a place only keeps what it is given, until the batch
ends or what is kept becomes much, and one kernel (``statistics.kernels``) reads all of it. What was read waits (``layout``) for
many batches.
"""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from actprune.core.hooks import Ear
from actprune.core.tensors import sent, writes
from actprune.pruning.layout import Chunk, Layout, Place
from actprune.pruning.reads import Reads
from actprune.pruning.sampling import Sampling
from actprune.pruning.updates import Company, Updates

_LOG = logging.getLogger(__name__)

_KEPT = 32
"""Activations are kept until they are this part of the device's memory."""

_WRITTEN = (
    "%s: what it reads is written to in place afterwards, in batch %d and not in the first one; that batch is left out there, "
    "and from now on every layer is read at once, which takes longer"
)
_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass
class _Trial:
    place: Place
    x: Tensor
    bits: Tensor
    """Sums of x's bits at that time: not every write is counted, nor does every one change what is read of few samples."""
    writes: int | None


class Fused:
    """The places of a network that are read together.

    Args:
        sampling: what is drawn.
        updates: knows the number of the batch, and takes what was read.
        alone: reads one place by itself.
    """

    def __init__(self, sampling: Sampling, updates: Updates, alone: Callable[[Reads, Tensor], None]) -> None:
        self._sampling, self._updates, self._alone = sampling, updates, alone
        self._kernels: Any = None
        self._device = torch.device("cpu")
        self._ears: Mapping[int, Ear] = {}
        self._trials: list[_Trial] = []
        self._kept = 0
        self._chunks: list[Chunk] = []
        self._layout: Layout | None = None
        self._together: set[int] = set()
        self._others: list[Reads] | None = None
        self._ids: list[Tensor] = []
        self._batches: list[int] = []
        self._row = self._most = 0
        self._now: Tensor | None = None
        self._is_first, self._is_on, self._gives_up = True, False, False
        updates.others.append(self._drained)

    def listen(self, ears: Mapping[int, Ear]) -> None:
        """Say who hears what a place is given: identity of its reads -> ear; for those that hear for nobody else."""
        self._ears, self._is_on = ears, False
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
            self._set_up(ids)
        elif self._layout is not None:
            if all([not any(c.seen) if c.is_read else self._read(c, ids, self._layout) for c in self._chunks]):
                self._waits(ids)
            else:
                self._apart(ids, self._layout)
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
        self._trials, self._kept, self._now = [], 0, None
        self._chunks = [] if self._is_first else self._chunks
        for chunk in self._chunks:
            chunk.is_read = False
            for seen in chunk.seen:
                seen.clear()
        self._turn(on=False)

    def _turn(self, on: bool) -> None:
        if self._is_on == on or self._layout is None:
            return
        self._is_on = on
        for chunk in self._chunks:
            for place in chunk.places:
                place.ear.watcher = place.keep if on else place.alone
        for chunk in self._chunks if on else ():
            chunk.places[0].ear.watcher = partial(self._first, chunk.places[0])
        for chunk in self._chunks[:-1] if on else ():
            chunk.places[-1].ear.watcher = partial(self._last, chunk)

    # the first batch

    def try_out(self, reads: Reads, x: Tensor) -> None:
        """A place was read by itself in the first batch: x, as it was given."""
        usual, ear = reads.usual, self._ears.get(id(reads))
        if not self._is_first or self._now is None or usual is None or ear is None or type(x) is not Tensor:
            return  # what a subclass shows need not lie in its memory
        (shape, dtype, device), hands = usual
        if self._kernels is None:
            self._kernels, self._device = kernels(device), device
            self._is_first = self._kernels is not None
        if device != self._device or self._kernels is None or dtype not in self._kernels.TYPES or not x.is_contiguous():
            return
        place = Place(reads, ear, ear.watcher, tuple(shape[1:]), dtype, hands)
        self._trials.append(_Trial(place, x, _bits(x), writes(x)))
        self._kept += x.numel() * x.element_size()
        if self._kept > _memory(device) // _KEPT:
            self._close()

    def _close(self) -> None:
        """Make a chunk of the places that still hold what was read."""
        trials, self._trials, self._kept = [t for t in self._trials if self._is_once(t.place)], [], 0
        if not trials:
            return
        changed = _changed([trial.bits for trial in trials], [_bits(trial.x) for trial in trials])
        changed |= {k for k, trial in enumerate(trials) if writes(trial.x) != trial.writes}
        self._chunks.append(Chunk([trial.place for k, trial in enumerate(trials) if k not in changed]))

    def _is_once(self, place: Place) -> bool:
        return all(self._updates.waits_once(hand.parts) for hand in place.hands)

    def _set_up(self, ids: Tensor) -> None:
        """Lay out what is read from now on, and move what was read of this batch there."""
        if not self._trials and not self._chunks:
            return
        self._is_first = False
        self._close()
        once = ([place for place in chunk.places if self._is_once(place)] for chunk in self._chunks)
        self._chunks = [Chunk(places) for places in once if places]
        layout = Layout(self._chunks, self._kernels, self._sampling.k, self._updates.kind, self._device, _memory(self._device))
        if layout.rows < len(ids):
            return
        # of more samples, more would be kept
        largest = max(sum(math.prod(place.shape) * place.dtype.itemsize for place in chunk.places) for chunk in self._chunks)
        self._most = min(layout.rows, max(len(ids), _memory(self._device) // _KEPT // max(1, largest)))
        self._layout, self._others = layout, None
        self._together = {id(place.reads) for chunk in self._chunks for place in chunk.places}
        layout.fill(lambda hand: self._updates.withdraw(hand.parts), len(ids), self._halves(ids))
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

    def _read(self, chunk: Chunk, ids: Tensor, layout: Layout) -> bool:
        """Read what a chunk's places kept, if that is as it was in the first batch."""
        kept = None if self._is_written(chunk) else chunk.given(len(ids), self._device)
        if kept is None:
            return False
        addresses = list(map(Tensor.data_ptr, kept))
        for launch in chunk.launches:
            heads = _heads(addresses if launch.places is None else [addresses[at] for at in launch.places], ids, self._device)
            arguments = (heads, launch.sources, layout.out, self._row, len(ids), launch.widest)
            if launch.is_mean:
                self._kernels.means(*arguments, launch.dtype)
            else:
                self._kernels.few(*arguments, self._sampling.is_halved, launch.dtype)
        for seen in chunk.seen:
            seen.clear()
        chunk.is_read = True
        return True

    def _apart(self, ids: Tensor, layout: Layout) -> None:
        """Some places were reached otherwise than in the first batch: this batch of all places is handed over by itself."""
        every, rows = self._sampling.on(self._device, ids), self._halves(ids)
        few = every if rows is None else every[rows]
        for chunk in self._chunks:
            self._each(chunk)
            for place in chunk.places:
                for hand in place.hands if chunk.is_read else ():
                    x = layout.at(place, hand, self._row, len(ids))
                    halved = hand.how == "few" and rows is not None
                    self._updates.add(hand.parts, x[rows] if halved else x.clone(), few if halved else every)

    def _each(self, chunk: Chunk) -> None:
        """Read by themselves what a chunk's places keep."""
        self._is_written(chunk)
        for place in chunk.places:
            seen = list(place.seen)
            place.seen.clear()
            for x, _ in seen:
                self._alone(place.reads, x)

    def _is_written(self, chunk: Chunk) -> bool:
        """Whether anything that a chunk's places keep is no longer as it was given; that is let go."""
        written = chunk.written()
        for place in written:
            self._gives_up = True
            place.seen.clear()
            _LOG.warning(_WRITTEN, place.reads.module, self._updates.batch)
        return bool(written)

    def _halves(self, ids: Tensor) -> Tensor | None:
        """On the device, the rows that are read where positions are drawn; None: all."""
        return sent(self._sampling.halves(ids), self._device) if self._sampling.is_halved else None

    def _waits(self, ids: Tensor) -> None:
        self._row += len(ids)
        self._ids.append(ids)
        self._batches.append(self._updates.batch)

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


@functools.cache
def kernels(device: torch.device) -> Any:
    """``statistics.kernels``, where this device can run them; else None."""
    if device.type != "cuda":
        return None
    try:
        from actprune.statistics import kernels as found

        found.try_out(device)
    except Exception as error:
        _LOG.info("places are read one by one, which takes longer: %s: %s", type(error).__name__, error)
        return None
    return found


def _bits(x: Tensor) -> Tensor:
    """Sums of the bits of every so manieth element, int64, at most 4,096 of them: NaN equals itself, and what moves shows."""
    bits = x.detach().view(_INTEGERS[x.element_size()])
    return bits.view(-1, math.gcd(bits.numel(), 1 << 12)).sum(0)


def _changed(before: list[Tensor], after: list[Tensor]) -> set[int]:
    """Which of several tensors are not what they were; the host waits once for all of them."""
    ends = torch.tensor([len(bits) for bits in before], device="cpu").cumsum(0)
    differ = (torch.cat(before) != torch.cat(after)).nonzero().flatten().cpu()
    return set(torch.bucketize(differ, ends, right=True).tolist())


def _memory(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else 1 << 33


def _heads(addresses: list[int], ids: Tensor, device: torch.device) -> Tensor:
    """What a kernel is told of a batch, in one copy for which the host does not wait."""
    host = torch.empty(len(addresses) + len(ids), dtype=torch.int64, device="cpu", pin_memory=device.type == "cuda")
    there = host.numpy()
    there[: len(addresses)] = addresses
    there[len(addresses) :] = ids.numpy()
    return host.to(device, non_blocking=True) if device.type == "cuda" else host
