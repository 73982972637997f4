"""Observe: accumulate the criterion's and the compensation's statistics while batches flow through the model.

Of large maps, a criterion's statistics see a few positions, of many samples in every second one (``statistics.positions``),
unless they ask for whole maps or for means; one draw and one copy serve all of them. Compensation sees everything. A NaN that
no statistic sees is not reported.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from actprune.compensation import Compensation, Layer, Mean
from actprune.core.calling import device_of
from actprune.core.errors import ObservationError
from actprune.core.gates import Place
from actprune.core.hooks import Watcher, joined, listening, uncompiled, watch_operands
from actprune.core.labels import check_class_vector
from actprune.core.switches import GARBAGE
from actprune.core.views import Criterion, Statistic
from actprune.graph import Consumer, Graph, is_recurrent
from actprune.pruning.folded import layer_of, statistic_of
from actprune.pruning.fused import Fused
from actprune.pruning.gradients import differentiated
from actprune.pruning.reads import Reads, is_identity
from actprune.pruning.rows import Rows
from actprune.pruning.sampling import Sampling
from actprune.pruning.settings import is_plain
from actprune.pruning.unfolded import tell_unfolded
from actprune.pruning.updates import Make, Part, Updates
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
        self._make = criterion.statistics()
        self._widths = {group.name: group.size for group in graph.unlocked}
        self._rows = Rows(model, self._sampling)
        self._fused = Fused(self._sampling, self._rows, self._updates, lambda reads, x: self._see(reads, x, reads.dim))
        self._next_id = 0
        self._paused = self._needs_labels = self._began = False
        self._needs_readers = criterion.needs_readers
        self._scores: dict[str, dict[str, list[Statistic]]] = {}
        self._folds: dict[int, tuple[Layer, Statistic]] = {}
        self._inputs: dict[str, list[Watcher]] = defaultdict(list)
        self._operands: dict[str, dict[tuple[int, int], list[Watcher]]] = defaultdict(lambda: defaultdict(list))
        self._gates: dict[str, dict[Place, dict[int, Reads]]] = defaultdict(lambda: defaultdict(dict))
        self._reads: dict[tuple[str, int | None, int, int], Reads] = {}
        self._where: dict[int, str] = {}
        self._like: dict[tuple[str, int], Accumulator] = {}
        with GARBAGE.turned():
            self._criterion(graph, criterion)
            if compensation is not None:
                self._compensation(graph, compensation)

    def _criterion(self, graph: Graph, criterion: Criterion) -> None:
        wanted = criterion.statistics()
        for group in graph.unlocked if wanted else ():
            if not group.sites:
                raise ObservationError(
                    f"group {group.name!r} is read nowhere that can be observed; score it by weights, or lock it"
                )
            made: dict[str, list[Statistic]] = {key: [] for key in wanted}
            for site in group.sites:
                here = [(key, self._statistic(key, wanted[key], group.size)) for key in wanted]
                kinds: dict[str | None, list[tuple[str, Statistic]]] = defaultdict(list)
                for key, statistic in here:
                    made[key].append(statistic)
                    kinds[statistic.differentiates].append((key, statistic))
                    self._needs_labels |= statistic.needs_labels
                    self._where[id(statistic)] = f"group {group.name!r} as read by {site.name!r}"
                index = None if is_identity(site.positions) else torch.from_numpy(site.positions)
                for kind, statistics in kinds.items():
                    if kind is None:
                        reads = self._read_at(site.module, site.ordinal, site.operand, site.dim)
                    else:
                        places = self._gates[kind][site.module, site.ordinal, site.operand]
                        reads = places.setdefault(site.dim, self._nothing(site.module, site.dim))
                    reads.entries.append((site, index, statistics))
            self._scores[group.name] = made

    def _statistic(self, key: str, make: Make, size: int) -> Any:
        """A statistic that has seen nothing; one of each size is made, the others are like it."""
        like = self._like.get((key, size))
        if like is not None:
            return like.another()
        made = make(size)
        if isinstance(made, Accumulator) and made.joinable and is_plain(made) and type(made).update is Accumulator.update:
            self._like[key, size] = made
        return made

    def _nothing(self, module: str, dim: int) -> Reads:
        return Reads(module, dim, self._make, self._sampling, self._updates)

    def _read_at(self, module: str, ordinal: int | None, operand: int, dim: int) -> Reads:
        """What is read at one place, watched from the first time on that it is asked for."""
        at = (module, ordinal, operand, dim)
        if at not in self._reads:
            self._reads[at] = self._nothing(module, dim)
            self._at(module, ordinal, operand, partial(self._watch, self._reads[at]))
        return self._reads[at]

    def _compensation(self, graph: Graph, compensation: Compensation) -> None:
        cuttable = np.zeros(graph.n_classes + 1, dtype=bool)
        for group in graph.unlocked:
            cuttable[group.classes] = True
        tell_unfolded(self._model, graph)
        runs = Counter(consumer.weight for consumer in graph.consumers)
        plain = type(compensation) is Mean  # whose statistics are alike for all layers
        # variances over positions, too, only where a criterion asks for them
        means_do = plain and not self._needs_readers
        for number, consumer in enumerate(graph.consumers):
            if not cuttable[consumer.reads].any():
                continue
            layer = layer_of(self._model, consumer, runs[consumer.weight])
            make = partial(statistic_of, compensation, means_do, layer)
            statistic = self._statistic("compensation", make, len(consumer.reads)) if plain else make(len(consumer.reads))
            if statistic is None:
                continue
            self._where[id(statistic)] = f"the input of {consumer.site!r}"
            self._folds[number] = (layer, statistic)
            place = (consumer.module, consumer.ordinal, consumer.operand)
            if means_do:
                part = Part("compensation", make, statistic)
                self._read_at(*place, consumer.dim).folded.append((layer, part))
            else:
                self._at(*place, partial(self._channels, consumer, layer, statistic, compensation))

    def _at(self, module: str, ordinal: int | None, operand: int, watcher: Watcher) -> None:
        if ordinal is None:
            self._inputs[module].append(watcher)
        else:
            self._operands[module][(ordinal, operand)].append(watcher)

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
        if self._needs_labels and ids is not self._rows.ids and reads.needs_labels:
            raise ObservationError(
                f"{self._where[id(reads.entries[0][2][0][1])]}: no dimension of what it reads counts the "
                f"{len(self._rows.announced)} samples, so its rows have no label; choose a criterion without labels"
            )
        as_read = x.shape == read.shape and dim % x.dim() == 1 and ids is self._rows.ids
        reads.hand_over(x, ids, self._rows.labels, as_read, several=x.dim() > read.dim() > 1)

    def _channels(self, consumer: Consumer, layer: Layer, statistic: Statistic, compensation: Compensation, x: Tensor) -> None:
        if self._paused:
            return
        x, ids = self._rows.samples(x, consumer.dim, consumer.module)
        if len(ids):
            layer.sees(x)
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
        if self._needs_labels:
            check_class_vector(labels, len(sample_ids))
        if self._began:
            self._fused.end()
            self._updates.batch_ends()
        self._began = True
        self._sampling.next_batch()
        self._rows.begin(sample_ids if isinstance(sample_ids, range) else sample_ids.to("cpu", torch.int64), labels)
        self._next_id += len(self._rows.numbers)
        self._fused.begin()
        for reads in self._fused.others(self._reads.values()):
            reads.get_ready(self._rows.ids)

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
        for kind, places in self._gates.items():
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
        return frozenset(self._gates)

    @property
    def watches(self) -> bool:
        """Whether anything is observed without gradients."""
        return bool(self._inputs or self._operands)

    @property
    def needs_labels(self) -> bool:
        """Whether the criterion needs the samples' classes."""
        return self._needs_labels

    @property
    def scores(self) -> dict[str, dict[str, list[Statistic]]]:
        """Group name -> statistic key -> one statistic per site, in execution order."""
        self._updates.flush()
        return self._scores

    @property
    def folds(self) -> dict[int, tuple[Layer, Statistic]]:
        """Index into ``graph.consumers`` -> layer and statistic of its input channels."""
        self._updates.flush()
        return self._folds

    @property
    def n_samples(self) -> int:
        """Samples announced so far on this process."""
        return self._next_id

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Hooks are on inside the block only."""
        with ExitStack() as stack:
            stack.enter_context(uncompiled())
            watchers = {k: joined(v, is_recurrent(self._model.get_submodule(k))) for k, v in self._inputs.items()}
            ears = stack.enter_context(listening(self._model, watchers))
            at = ((path, reads) for (path, k, *_), reads in self._reads.items() if k is None and len(self._inputs[path]) == 1)
            self._fused.listen({id(reads): ears[path] for path, reads in at})
            stack.enter_context(watch_operands(self._model, self._operands))
            try:
                yield
            except BaseException:  # who handles it may need the memory
                self._fused.drop()
                raise
            self._fused.stop()  # while ears are there that may be told
        self._updates.flush()
        self._fused.release()  # now: an observation refers to itself, so it may be there long after anybody needs it
        self._updates.arena.release()
        for reads in self._reads.values():
            reads.expect_nothing()

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
                raise ObservationError(f"at {self._where[id(statistic)]}: {error}{cure}") from None
