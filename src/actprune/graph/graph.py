"""The channel graph: groups of units that may leave, where they are read, what everything costs."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from actprune.core.copied import Copies
from actprune.core.operands import Ordinal
from actprune.graph.cost import CostModel
from actprune.graph.extents import Extents


@dataclass(frozen=True)
class Site:
    """A place where a group's activations are observed: an input that a contraction reads."""

    name: str
    """Path of the module that reads, with ``#k`` where it reads more than once."""
    module: str
    """Path of the module to hook."""
    ordinal: Ordinal | None
    """None: the module's own input is what is read; else which contraction inside the module's forward reads it."""
    operand: int
    """Argument position of the activation."""
    dim: int
    """The activation's channel dimension, from the end."""
    positions: NDArray[np.int64]
    """(n_units, k) positions of every unit along ``dim``."""
    flattened: tuple[int, ...] = ()
    """Extents that were flattened to ``dim``, -1 in the channels' place: (-1, 7, 7) where units are maps; () for none."""


@dataclass(frozen=True)
class Consumer:
    """A contraction with a weight that reads cuttable units: where compensation may act."""

    module: str
    weight: str
    """Name of the weight parameter."""
    reads_dim: int
    """The weight's dimension that is summed over."""
    reads: NDArray[np.int64]
    """Class index of every position along that dimension, -1 where fixed."""
    writes: NDArray[np.int64] | None
    """Class index of every output channel."""
    bias: str | None
    batch_norm: str | None
    """Path of the batch norm that alone reads the output."""
    site: str
    """Name of the site at which this consumer reads."""
    ordinal: Ordinal | None
    operand: int
    dim: int

    @property
    def reads_own_weight(self) -> bool:
        """Whether the weight is what its module calls ``weight``."""
        return self.weight == (f"{self.module}.weight" if self.module else "weight")


@dataclass(frozen=True)
class Group:
    """Interchangeable units of one width."""

    name: str
    """Path of the module that produces the units."""
    size: int
    """Number of units."""
    locked: str | None
    """Why no unit may leave, or None."""
    members: Mapping[tuple[str, int], NDArray[np.int64]]
    """(parameter or buffer, dimension) -> (n_units, k) positions that leave with each unit."""
    classes: NDArray[np.int64]
    """(n_units,) class index of every unit in the cost model."""
    sites: Sequence[Site] = ()

    def __repr__(self) -> str:
        """Short enough for a list of groups."""
        return f"Group({self.name!r}, size={self.size}, locked={self.locked!r})"


@dataclass(frozen=True)
class Follower:
    """A module attribute whose value follows the cut."""

    module: str
    attribute: str
    index: int | None
    counts: NDArray[np.int64]
    """Class index of every counted thing."""
    assumed: bool = False
    """Whether chance may have made it equal: it follows only if the cut model fails otherwise."""
    alone: bool = False
    """Whether it is one number of a list, whatever the others are."""

    @property
    def name(self) -> str:
        """What it is called among the module's integers."""
        return f"{self.attribute}[{self.index}]" if self.alone else self.attribute

    def value(self, removed: NDArray[np.bool_]) -> int:
        """The attribute's value when the marked classes are gone."""
        return _left(self.counts, removed)


@dataclass(frozen=True)
class Apart:
    """Two widths that the code compares and finds different: it may do something else once they are equal."""

    module: str
    one: NDArray[np.int64]
    """Class index of every position."""
    other: NDArray[np.int64] | int
    """The same, or what does not change."""

    def widths(self, removed: NDArray[np.bool_]) -> tuple[int, int]:
        """Both when the marked classes are gone."""
        return _left(self.one, removed), self.other if isinstance(self.other, int) else _left(self.other, removed)


def _left(column: NDArray[np.int64], removed: NDArray[np.bool_]) -> int:
    """How many positions stay when the marked classes are gone; class -1 indexes the appended entry: never removed."""
    return int(np.append(~removed, True)[column].sum())


@dataclass(frozen=True)
class Graph:
    """What ``trace`` returns."""

    groups: tuple[Group, ...]
    """Every group, in execution order; ``group.locked`` gives the reason where it cannot be cut."""
    columns: Mapping[tuple[str, int], NDArray[np.int64]]
    """(parameter or buffer, dimension) -> class index of every position, -1 where it has none."""
    consumers: tuple[Consumer, ...]
    followers: tuple[Follower, ...]
    possible: tuple[Follower, ...]
    """Attributes that may have to follow: they do where the cut model fails in their module otherwise."""
    may_tie: Mapping[str, Sequence[tuple[NDArray[np.int64], NDArray[np.int64]]]]
    """Module -> classes of a view's width and of an input's that it may be taken from: then it runs only if they stay equal."""
    cost: CostModel
    n_classes: int
    shapes: Mapping[str, tuple[int, ...]]
    """Shape of every parameter and buffer the model used."""
    extents: Extents
    """What every operator produced, for a rehearsal to compare with."""
    unknown: Mapping[str, int]
    """Operators without a rule that met cuttable ids -> how often."""
    apart: tuple[Apart, ...] = ()
    """Widths that must not become equal."""
    copies: Copies = field(default_factory=dict)
    """Parts that take the cuts of others: their tensors are in no group and in no cost."""

    @property
    def params(self) -> int:
        """Number of parameters."""
        return self.cost.evaluate("params")

    @property
    def macs(self) -> int:
        """Multiply-adds of one call on the example inputs."""
        return self.cost.evaluate("macs")

    @property
    def units(self) -> int:
        """Number of units of all groups that may be cut."""
        return sum(group.size for group in self.unlocked)

    def left(self, unit: str, removed: NDArray[np.bool_] | None = None) -> int:
        """What is left of ``"params"``, ``"macs"`` or ``"units"`` when the marked classes are gone; None: none is."""
        if unit != "units":
            return self.cost.evaluate(unit, removed)
        return self.units - (0 if removed is None else sum(int(removed[group.classes].sum()) for group in self.unlocked))

    @property
    def unlocked(self) -> tuple[Group, ...]:
        """The groups whose units may leave."""
        return tuple(group for group in self.groups if group.locked is None)

    def group(self, name: str) -> Group:
        """Return the group of this name.

        Raises:
            KeyError: there is none.
        """
        if name not in self._by_name:
            raise KeyError(f"no group {name!r}; groups: {', '.join(g.name for g in self.groups)}")
        return self._by_name[name]

    @functools.cached_property
    def _by_name(self) -> dict[str, Group]:
        return {group.name: group for group in self.groups}

    def removed(self, units: Mapping[str, Iterable[int]]) -> NDArray[np.bool_]:
        """Mask over classes of ``units``: group name -> indices of the units that leave."""
        mask = np.zeros(self.n_classes, dtype=bool)
        for name, indices in units.items():
            mask[self.group(name).classes[np.fromiter(indices, dtype=np.int64)]] = True
        return mask

    def __str__(self) -> str:
        """A table of groups: width, what leaves with a unit, why a group is locked."""
        lines = [
            f"{len(self.unlocked)} groups can be cut, {len(self.groups) - len(self.unlocked)} are locked; "
            f"{self.params:,} parameters, {self.macs:,} MACs"
        ]
        width = min(44, max((len(g.name) for g in self.groups), default=0))
        for group in self.groups:
            tensors = sorted({name for name, _ in group.members})
            leaves = f"{len(tensors)} tensors: {tensors[0]}{', ...' if len(tensors) > 1 else ''}"
            lines.append(f"{group.name:<{width}} {group.size:>6}  {group.locked or leaves}")
        lines += [f"no rule for {name} ({count}x): what it touches is locked" for name, count in self.unknown.items()]
        return "\n".join(lines)
