"""Observe: accumulate the criterion's and the compensation's statistics while batches flow through the model.

Of large maps, a criterion's statistics see a few positions, of many samples in every second one (``statistics.positions``),
unless they ask for whole maps or for means; one draw and one copy serve all of them. Compensation sees everything. A NaN that
no statistic sees is not reported.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from actprune.compensation import Compensation, Layer
from actprune.core.calling import device_of
from actprune.core.errors import ObservationError
from actprune.core.hooks import joined, listening, uncompiled
from actprune.core.labels import check_class_vector
from actprune.core.linears import hear_operands
from actprune.core.switches import GARBAGE
from actprune.core.views import Criterion, Statistic
from actprune.graph import Consumer, Graph, is_recurrent
from actprune.pruning.fused import Fused
from actprune.pruning.gradients import differentiated
from actprune.pruning.reads import Reads
from actprune.pruning.rows import Rows
from actprune.pruning.sampling import Sampling
from actprune.pruning.updates import Updates
from actprune.pruning.wiring import Wiring
from actprune.statistics import EVERYTHING, Accumulator, Density, all_reduce


class Observation:
    """Statistics of one validation epoch: per group and site for the criterion, per consumer for compensation.

    Args:
        model: the model.
        graph: its channel graph.
        criterion: whose statistics are accumulated at every site.
        compensation: whose statistics are accumulated at every layer that reads units.
        density: how much of large maps the criterion's statistics see.
    """

    def __init__(
        self,
        model: nn.Module,
        graph: Graph,
        criterion: Criterion,
        compensation: Compensation | None,
        density: Density = EVERYTHING,
    ) -> None:
        self._model = model
        self._sampling, self._updates = Sampling(density), Updates()
        make = criterion.statistics()
        self._widths = {group.name: group.size for group in graph.unlocked}
        self._rows = Rows(model, self._sampling)
        self._fused = Fused(self._sampling, self._rows, self._updates, lambda reads, x: self._see(reads, x, reads.dim))
        self._next_id = 0
        self._paused = self._began = False
        self._forward_begins: Callable[[], None] = lambda: None
        nothing = partial(Reads, make=make, sampling=self._sampling, updates=self._updates)
        with GARBAGE.turned():
            self._wiring = Wiring(model, nothing, self._watch, self._channels)
            self._wiring.of_criterion(graph, criterion)
            if compensation is not None:
                self._wiring.of_compensation(graph, compensation, criterion.needs_readers)

    def _watch(self, reads: Reads, x: Tensor) -> None:
        if self._paused or reads.takes(x):
            return
        if not self._fused.tries(reads, x, self._rows.are_usual(x, reads.dim, reads.module)):
            self._see(reads, x, reads.dim)

    def _see(self, reads: Reads, x: Tensor, dim: int) -> None:
        """Hand what one place reads to the statistics of all groups that are read there."""
        read = x
        x, ids = self._rows.samples(read, dim, reads.module)
        if not len(ids):
            return
        if self._wiring.needs_labels and ids is not self._rows.ids and reads.needs_labels:
            raise ObservationError(
                f"{self._wiring.where[id(reads.entries[0][2][0][1])]}: no dimension of what it reads counts the "
                f"{len(self._rows.announced)} samples, so its rows have no label; choose a criterion without labels"
            )
        again = read if ids is self._rows.ids and not self._rows.leaves_out else None
        reads.hand_over(x, ids, self._rows.labels, again, several=x.dim() > read.dim() > 1)

    def _channels(self, consumer: Consumer, layer: Layer, statistic: Statistic, compensation: Compensation, x: Tensor) -> None:
        if self._paused:
            return
        x, ids = self._rows.samples(x, consumer.dim, consumer.module)
        if len(ids):
            layer.sees(x)
            if isinstance(statistic, Accumulator):
                statistic.batch = self._updates.batch
            compensation.observe(statistic, layer, x, self._sampling.on(x.device, ids))

    def begin_batch(self, sample_ids: Tensor | range, labels: Tensor | None = None) -> None:
        """Name the samples of the batch that comes next.

        Args:
            sample_ids: (N,) int64, the same for the same sample whatever the batch or the rank; -1 for a sample that another
                batch or rank has as well, which is not counted here. A range of numbers from 0 on costs a GPU least.
            labels: (N,) integers, the samples' classes; only where ``needs_labels``.

        Raises:
            ObservationError: labels are needed and are not there, or are not N integers.
        """
        if self._paused:
            return
        if self._wiring.needs_labels:
            check_class_vector(labels, len(sample_ids))
        if self._began:
            self._fused.end()
            self._updates.batch_ends()
        self._began = True
        self._sampling.next_batch()
        self._rows.begin(sample_ids if isinstance(sample_ids, range) else sample_ids.to("cpu", torch.int64), labels)
        self._next_id += len(self._rows.numbers)
        self._fused.begin()
        self._forward_begins()
        ids = None if self._rows.leaves_out else self._rows.ids
        for reads in self._fused.others(self._wiring.reads.values()):
            reads.get_ready(ids)

    def differentiate(self, outputs: Callable[[], Any] | None = None, loss: Callable[[], Tensor] | None = None) -> None:
        """Run the batch that was named once more, for statistics of gradients; nothing to do where there are none.

        Everything is as it was afterwards: parameters and their ``.grad``, buffers, modes, random numbers. The model runs in
        evaluation mode, also where the caller is under ``no_grad`` or ``inference_mode``. At most one batch's graph is held.

        Args:
            outputs: runs the network on the batch and returns its outputs; needed if ``differentiates`` holds ``outputs`` or
                ``output_sum``.
            loss: runs the network on the batch and returns the mean of its samples' losses; needed if it holds ``loss``.

        Raises:
            ObservationError: a run is needed and not given, or what it returns has no gradient.
        """
        for kind, places in self._wiring.gates.items():
            run = loss if kind == "loss" else outputs
            if run is None:
                raise ObservationError(f"the criterion differentiates {kind}: give differentiate() a function that returns it")
            with self.paused():
                for reading, x in differentiated(self._model, list(places), kind, run, len(self._rows.announced)):
                    for dim, reads in places[reading.place].items():
                        self._see(reads, x, dim if reading.dim is None else reading.dim)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Inside the block what the model runs is not observed, and no batch begins; ``differentiate`` may be called."""
        self._fused.stop()
        before, self._paused = self._paused, True
        try:
            yield
        finally:
            self._paused = before

    @contextmanager
    def resumed(self) -> Iterator[None]:
        """Inside a block in which nothing is observed: what runs here is, and is counted when this one ends."""
        before, self._paused = self._paused, False
        try:
            yield
        except BaseException:
            self._fused.drop()
            raise
        finally:
            self._fused.stop()
            self._paused = before

    @property
    def differentiates(self) -> frozenset[str]:
        """What the criterion differentiates: ``loss``, ``outputs``, ``output_sum``; empty for criteria without gradients."""
        return frozenset(self._wiring.gates)

    @property
    def watches(self) -> bool:
        """Whether anything is observed without gradients."""
        return bool(self._wiring.inputs or self._wiring.operands)

    @property
    def needs_labels(self) -> bool:
        """Whether the criterion needs the samples' classes."""
        return self._wiring.needs_labels

    @property
    def scores(self) -> dict[str, dict[str, list[Statistic]]]:
        """Group name -> statistic key -> one statistic per site, in execution order."""
        self._updates.flush()
        return self._wiring.scores

    @property
    def folds(self) -> dict[int, tuple[Layer, Statistic]]:
        """Index into ``graph.consumers`` -> layer and statistic of its input channels."""
        self._updates.flush()
        return self._wiring.folds

    @property
    def n_samples(self) -> int:
        """Samples announced so far on this process."""
        return self._next_id

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Hooks are on inside the block only."""
        with ExitStack() as stack:
            stack.enter_context(uncompiled())
            inputs, reads = self._wiring.inputs, self._wiring.reads
            watchers = {path: joined(each, is_recurrent(self._model.get_submodule(path))) for path, each in inputs.items()}
            ears = stack.enter_context(listening(self._model, watchers))
            alone = ((path, each) for (path, k, *_), each in reads.items() if k is None and len(inputs[path]) == 1)
            self._fused.listen({id(each): ears[path] for path, each in alone})
            self._forward_begins = stack.enter_context(
                hear_operands(self._model, self._wiring.operands, lambda: not self._paused)
            )
            try:
                yield
            except BaseException:  # who handles it may need the memory
                self._fused.drop()
                raise
            self._fused.stop()  # while ears are there that may be told
        self._updates.flush()
        self._fused.release()  # now: an observation refers to itself, so it may be there long after anybody needs it
        self._updates.arena.release()
        for place in reads.values():
            place.expect_nothing()

    def _statistics(self) -> list[Statistic]:
        of_groups = [s for by_key in self.scores.values() for sites in by_key.values() for s in sites]
        return of_groups + [statistic for _, statistic in self.folds.values()]

    def reduce(self, group: dist.ProcessGroup | None = None) -> None:
        """Merge the statistics of all ranks, on every rank; nothing to do on a single process."""
        if dist.is_available() and dist.is_initialized() and dist.get_world_size(group) > 1:
            all_reduce(self._statistics(), group, device_of(self._model))

    def check(self, graph: Graph) -> None:
        """Raise if nothing was seen, or anything that is not finite, or if the model was cut since.

        Args:
            graph: the channel graph of the model as it is.

        Raises:
            ObservationError: names the site and the first batch, or the group of another width now; or no batch had begun.
        """
        now = {group.name: group.size for group in graph.groups}
        for name, before in self._widths.items():
            if now.get(name, before) != before:
                raise ObservationError(
                    f"group {name!r} has {now[name]} units, {before} were observed; the model was cut since: observe it again"
                )
        self._rows.check()
        for statistic in self._statistics():
            try:
                statistic.check()
            except ObservationError as error:
                cure = ""
                if statistic.n_samples == 0 < self._next_id and self._sampling.is_halved:
                    cure = f"; of {self._next_id} samples every second one is read, drawn: give more, or fix positions"
                if statistic.differentiates is not None and statistic.n_samples == 0:
                    cure = "; it is a statistic of gradients: call differentiate() after every batch"
                raise ObservationError(f"at {self._wiring.where[id(statistic)]}: {error}{cure}") from None
