"""Observe: accumulate the criterion's and the compensation's statistics while batches flow through the model."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from actprune.compensation import Compensation, Layer
from actprune.core.errors import ObservationError
from actprune.core.hooks import Watcher, uncompiled, watch_inputs, watch_operands
from actprune.core.views import Criterion, Statistic
from actprune.graph import Consumer, Graph, Site
from actprune.statistics import all_reduce


class Observation:
    """Statistics of one validation epoch: per group and site for the criterion, per consumer for compensation."""

    def __init__(self, model: nn.Module, graph: Graph, criterion: Criterion, compensation: Compensation | None) -> None:
        self._model = model
        self._sample_ids = torch.empty(0, dtype=torch.int64)
        self._next_id = 0
        self.scores: dict[str, dict[str, list[Statistic]]] = {}
        """Group name -> statistic key -> one statistic per site, in execution order."""
        self.folds: dict[int, tuple[Layer, Statistic]] = {}
        """Index into ``graph.consumers`` -> layer and statistic of its input channels."""
        self._inputs: dict[str, list[Watcher]] = defaultdict(list)
        self._operands: dict[str, dict[tuple[int, int], list[Watcher]]] = defaultdict(lambda: defaultdict(list))
        self._where: dict[int, str] = {}
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
                here = [(key, wanted[key](group.size)) for key in wanted]
                for key, statistic in here:
                    made[key].append(statistic)
                    self._where[id(statistic)] = f"group {group.name!r} as read by {site.name!r}"
                index = torch.from_numpy(site.positions)
                self._at(site.module, site.ordinal, site.operand, partial(self._units, site, index, [s for _, s in here]))
            self.scores[group.name] = made

    def _compensation(self, graph: Graph, compensation: Compensation) -> None:
        cuttable = np.zeros(graph.n_classes + 1, dtype=bool)
        for group in graph.unlocked:
            cuttable[group.classes] = True
        runs = Counter(consumer.weight for consumer in graph.consumers)
        for number, consumer in enumerate(graph.consumers):
            if not cuttable[consumer.reads].any():
                continue
            layer = layer_of(self._model, consumer, runs[consumer.weight])
            statistic = compensation.statistic(layer, len(consumer.reads))
            if statistic is None:
                continue
            self._where[id(statistic)] = f"the input of {consumer.site!r}"
            self.folds[number] = (layer, statistic)
            watcher = partial(self._channels, consumer, layer, statistic, compensation)
            self._at(consumer.module, consumer.ordinal, consumer.operand, watcher)

    def _at(self, module: str, ordinal: int | None, operand: int, watcher: Watcher) -> None:
        if ordinal is None:
            self._inputs[module].append(watcher)
        else:
            self._operands[module][(ordinal, operand)].append(watcher)

    def _units(self, site: Site, index: Tensor, statistics: list[Statistic], x: Tensor) -> None:
        x, ids = self._samples(x, site.dim, site.module)
        x = x.reshape(*x.shape[:2], -1)
        units, width = index.shape
        if width > 1 or units != x.shape[1] or not _is_identity(site.positions):
            picked = x.index_select(1, index.to(x.device).flatten())
            x = picked.reshape(len(x), units, width * x.shape[2])
        for statistic in statistics:
            statistic.update(x, ids)

    def _channels(self, consumer: Consumer, layer: Layer, statistic: Statistic, compensation: Compensation, x: Tensor) -> None:
        x, ids = self._samples(x, consumer.dim, consumer.module)
        compensation.observe(statistic, layer, x, ids)

    def _samples(self, x: Tensor, dim: int, module: str) -> tuple[Tensor, Tensor]:
        """(N, C, *positions) and the ids of the N rows; where no dimension counts samples the rows are numbered anew."""
        x = x.detach().movedim(dim, -1)
        if x.dim() == 1:
            x = x.unsqueeze(0)
        ids, rows = self._sample_ids, x.shape[:-1]
        n = len(ids)
        if n and rows[0] != n and rows[0] % n == 0:
            # several rows per sample: windows or frames, the sample first; multi-head attention puts the position first
            first = type(self._model.get_submodule(module)) is not nn.MultiheadAttention
            x = x.unflatten(0, (n, -1)).movedim(1, -2) if first else x.unflatten(0, (-1, n)).movedim(0, -2)
            x = x.movedim(-2, -1).movedim(-2, 1)
        elif n and rows[0] != n and n in rows:
            x = x.movedim(rows.index(n), 0).movedim(-1, 1)
        else:
            x = x.movedim(-1, 1)
            if rows[0] != n:
                start = int(ids[0]) if n else 0
                ids = torch.arange(start, start + rows[0])
        return x, ids

    def begin_batch(self, sample_ids: Tensor) -> None:
        """Name the samples of the batch that comes next.

        Args:
            sample_ids: (N,) int64, the same for the same sample whatever the batch or the rank.
        """
        self._sample_ids = sample_ids
        self._next_id += len(sample_ids)

    @property
    def n_samples(self) -> int:
        """Samples announced so far on this process."""
        return self._next_id

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Hooks are on inside the block only."""
        with ExitStack() as stack:
            stack.enter_context(uncompiled(self._model))
            stack.enter_context(watch_inputs(self._model, {k: _all(v) for k, v in self._inputs.items()}))
            stack.enter_context(watch_operands(self._model, self._operands))
            yield

    def _statistics(self) -> list[Statistic]:
        of_groups = [s for by_key in self.scores.values() for sites in by_key.values() for s in sites]
        return of_groups + [statistic for _, statistic in self.folds.values()]

    def reduce(self, group: dist.ProcessGroup | None = None) -> None:
        """Merge the statistics of all ranks, on every rank; nothing to do on a single process."""
        if dist.is_available() and dist.is_initialized() and dist.get_world_size(group) > 1:
            all_reduce(self._statistics(), group)

    def check(self) -> None:
        """Raise if nothing was seen, or anything that is not finite.

        Raises:
            ObservationError: names the site and the first batch.
        """
        for statistic in self._statistics():
            try:
                statistic.check()  # type: ignore[operator]
            except ObservationError as error:
                raise ObservationError(f"at {self._where[id(statistic)]}: {error}") from None


def layer_of(model: nn.Module, consumer: Consumer, runs: int = 1) -> Layer:
    """A consumer with its tensors as they are now; ``runs``: how many contractions use its weight."""
    path, _, leaf = consumer.weight.rpartition(".")
    weight = getattr(model.get_submodule(path), leaf)
    return Layer(consumer.module, model.get_submodule(consumer.module), weight, consumer.reads_dim, runs)


def _is_identity(positions: np.ndarray) -> bool:
    return positions.shape[1] == 1 and np.array_equal(positions[:, 0], np.arange(len(positions)))


def _all(watchers: list[Watcher]) -> Watcher:
    def watch(x: Tensor) -> None:
        for watcher in watchers:
            watcher(x)

    return watch


__all__ = ["Observation", "layer_of"]
