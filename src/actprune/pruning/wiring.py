"""Wire a network for observation: which statistics hear what is read where."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from actprune.compensation import Compensation, Layer, Mean
from actprune.core.errors import ObservationError
from actprune.core.gates import Place
from actprune.core.hooks import Watcher
from actprune.core.operands import Ordinal
from actprune.core.views import Criterion, Statistic
from actprune.graph import Consumer, Graph
from actprune.pruning.folded import layer_of, statistic_of
from actprune.pruning.reads import Reads, is_identity
from actprune.pruning.settings import is_plain
from actprune.pruning.unfolded import tell_unfolded
from actprune.pruning.updates import Make, Part
from actprune.statistics import Accumulator


class Wiring:
    """Statistics that have seen nothing, and who hands them what.

    Args:
        model: the model.
        nothing: makes the reads of one place, of a module and the dimension of channels.
        watch: called with the reads of a place and what it reads.
        channels: called with a consumer, its layer, the layer's statistic, the compensation and what it reads.
    """

    def __init__(
        self,
        model: nn.Module,
        nothing: Callable[[str, int], Reads],
        watch: Callable[[Reads, Tensor], None],
        channels: Callable[[Consumer, Layer, Statistic, Compensation, Tensor], None],
    ) -> None:
        self._model, self._nothing, self._watch, self._channels = model, nothing, watch, channels
        self._like: dict[tuple[str, int], Accumulator] = {}
        self.needs_labels = False
        self.scores: dict[str, dict[str, list[Statistic]]] = {}
        """Group name -> statistic key -> one statistic per site."""
        self.folds: dict[int, tuple[Layer, Statistic]] = {}
        """Index of a consumer -> its layer and the statistic of its input."""
        self.inputs: dict[str, list[Watcher]] = defaultdict(list)
        """Module path -> who hears its first argument."""
        self.operands: dict[str, dict[tuple[Ordinal, int], list[Watcher]]] = defaultdict(lambda: defaultdict(list))
        """Module path -> which contraction, which operand -> who hears it."""
        self.gates: dict[str, dict[Place, dict[int, Reads]]] = defaultdict(lambda: defaultdict(dict))
        """What is differentiated -> place -> dimension of channels -> its reads."""
        self.reads: dict[tuple[str, Ordinal | None, int, int], Reads] = {}
        """Module path, contraction, operand, dimension of channels -> its reads."""
        self.where: dict[int, str] = {}
        """Identity of a statistic -> what it observes, in words."""

    def of_criterion(self, graph: Graph, criterion: Criterion) -> None:
        """Have every site of every group seen.

        Raises:
            ObservationError: a group is read nowhere.
        """
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
                    self.needs_labels |= statistic.needs_labels
                    self.where[id(statistic)] = f"group {group.name!r} as read by {site.name!r}"
                index = None if is_identity(site.positions) else torch.from_numpy(site.positions)
                for kind, statistics in kinds.items():
                    if kind is None:
                        reads = self._read_at(site.module, site.ordinal, site.operand, site.dim)
                    else:
                        places = self.gates[kind][site.module, site.ordinal, site.operand]
                        reads = places.setdefault(site.dim, self._nothing(site.module, site.dim))
                    reads.entries.append((site, index, statistics))
            self.scores[group.name] = made

    def _statistic(self, key: str, make: Make, size: int) -> Any:
        """A statistic that has seen nothing; one of each size is made, the others are like it."""
        like = self._like.get((key, size))
        if like is not None:
            return like.another()
        made = make(size)
        if isinstance(made, Accumulator) and made.joinable and is_plain(made) and type(made).update is Accumulator.update:
            self._like[key, size] = made
        return made

    def _read_at(self, module: str, ordinal: Ordinal | None, operand: int, dim: int) -> Reads:
        """What is read at one place, watched from the first time on that it is asked for."""
        at = (module, ordinal, operand, dim)
        if at not in self.reads:
            self.reads[at] = self._nothing(module, dim)
            self._at(module, ordinal, operand, partial(self._watch, self.reads[at]))
        return self.reads[at]

    def of_compensation(self, graph: Graph, compensation: Compensation, needs_readers: bool) -> None:
        """Have every layer that reads units seen; ``needs_readers``: the criterion reads what is observed there."""
        cuttable = np.zeros(graph.n_classes + 1, dtype=bool)
        for group in graph.unlocked:
            cuttable[group.classes] = True
        tell_unfolded(self._model, graph)
        runs = Counter(consumer.weight for consumer in graph.consumers)
        plain = type(compensation) is Mean  # whose statistics are alike for all layers
        # variances over positions, too, only where a criterion asks for them
        means_do = plain and not needs_readers
        for number, consumer in enumerate(graph.consumers):
            if not cuttable[consumer.reads].any():
                continue
            layer = layer_of(self._model, consumer, runs[consumer.weight])
            make = partial(statistic_of, compensation, means_do, layer)
            statistic = self._statistic("compensation", make, len(consumer.reads)) if plain else make(len(consumer.reads))
            if statistic is None:
                continue
            self.where[id(statistic)] = f"the input of {consumer.site!r}"
            self.folds[number] = (layer, statistic)
            place = (consumer.module, consumer.ordinal, consumer.operand)
            if means_do:
                part = Part("compensation", make, statistic)
                self._read_at(*place, consumer.dim).folded.append((layer, part))
            else:
                self._at(*place, partial(self._channels, consumer, layer, statistic, compensation))

    def _at(self, module: str, ordinal: Ordinal | None, operand: int, watcher: Watcher) -> None:
        if ordinal is None:
            self.inputs[module].append(watcher)
        else:
            self.operands[module][(ordinal, operand)].append(watcher)
