"""Replace units by their means where they are read: the network without them, no tensor cut.

Formula: at every site of the group, x[.., c, ..] = mu_c for the channels c of the units that are gone, with mu_c the mean over
samples and positions of what that site read on the observed batches. What ``Mean`` compensation makes of a cut, but exact at
zero-padded borders and behind any activation function: a unit's mean is what its readers get.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn

from actprune.core.errors import ObservationError
from actprune.core.hooks import Watcher, watch_inputs
from actprune.core.operands import Ordinal, watch_operands
from actprune.graph import Graph, Site

Units = Mapping[str, Collection[int]]
"""Group name -> indices of the units that are replaced."""


@dataclass
class _Place:
    """One site, and the mean of every channel that it reads."""

    group: str
    site: Site
    total: Tensor = field(default_factory=lambda: torch.zeros((), device="cpu"))
    """(C,) sums over samples and positions, float64, or complex of twice that."""
    n: int = 0
    """Samples times positions seen."""
    channels: Tensor | None = None
    """The channels to replace now."""
    values: Tensor | None = None
    """Their means."""


_Watch = Callable[[_Place, Tensor], "Tensor | None"]


class Replacement:
    """Means of everything that unlocked groups are read as, and forwards in which some of it is replaced by them.

    Args:
        model: the model.
        graph: its channel graph; groups that are read nowhere stay as they are.
    """

    def __init__(self, model: nn.Module, graph: Graph) -> None:
        self._model = model
        self._places = [_Place(group.name, site) for group in graph.unlocked for site in group.sites]

    @contextmanager
    def observing(self) -> Iterator[None]:
        """Forwards inside the block add to the means."""
        with self._watching(_add):
            yield

    @contextmanager
    def replacing(self) -> Iterator[None]:
        """Forwards inside the block read the means of what ``choose`` named; nothing at first."""
        self.choose({})
        try:
            with self._watching(_replaced):
                yield
        finally:
            self.choose({})

    def choose(self, units: Units) -> None:
        """Replace these units from now on.

        Raises:
            ObservationError: means were not observed.
        """
        for place in self._places:
            gone = sorted(units.get(place.group, ()))
            if not gone:
                place.channels = place.values = None
                continue
            if not place.n:
                raise ObservationError(f"site {place.site.name!r} saw 0 samples, needs at least 1; observe before replacing")
            place.channels = torch.from_numpy(place.site.positions[gone]).flatten().to(place.total.device)
            place.values = place.total[place.channels] / place.n

    def reads(self, group: str) -> Collection[str]:
        """Paths of the modules that read a group."""
        return {place.site.module for place in self._places if place.group == group}

    @contextmanager
    def _watching(self, watch: _Watch) -> Iterator[None]:
        inputs: dict[str, list[Watcher]] = defaultdict(list)
        operands: dict[str, dict[tuple[Ordinal, int], list[Watcher]]] = defaultdict(lambda: defaultdict(list))
        for place in self._places:
            site = place.site
            if site.ordinal is None:
                inputs[site.module].append(partial(watch, place))
            else:
                operands[site.module][(site.ordinal, site.operand)].append(partial(watch, place))
        with (
            watch_inputs(self._model, {path: _in_turn(watchers) for path, watchers in inputs.items()}),
            watch_operands(self._model, operands),
        ):
            yield


def _add(place: _Place, x: Tensor) -> None:
    rows = x.detach().movedim(place.site.dim, 0).flatten(1)
    place.total = rows.sum(1, dtype=torch.complex128 if rows.is_complex() else torch.float64) + place.total.to(rows.device)
    place.n += rows.shape[1]


def _replaced(place: _Place, x: Tensor) -> Tensor | None:
    if place.channels is None or place.values is None:
        return None
    dim = place.site.dim % x.dim()
    values = place.values.to(x.dtype).view([-1 if d == dim else 1 for d in range(x.dim())])
    shape = [len(place.channels) if d == dim else n for d, n in enumerate(x.shape)]
    return x.index_copy(dim, place.channels, values.expand(shape))


def _in_turn(watchers: list[Watcher]) -> Watcher:
    def watch(x: Tensor) -> Tensor | None:
        changed = None
        for watcher in watchers:
            other = watcher(x if changed is None else changed)
            changed = changed if other is None else other
        return changed

    return watch
