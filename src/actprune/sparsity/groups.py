"""Which elements of which parameters shrink together.

Two ways to form the units:

- ``input_groups``, the paper's: one input channel of a convolution with all its filters, one column of a linear
  layer. It needs shapes only.
- ``unit_groups``, ours: everything that leaves with a unit of the channel graph, so that a unit which becomes zero
  can be removed.

An element of a weight lies in two slices: it belongs to the unit that it helps to produce and to the unit that it
reads. A proximal operator with overlapping rows has no closed form, so every element gets one owner: **the unit that
it produces**; only where that dimension may not be cut (a classifier's outputs) the unit that it reads. A unit with
all its own elements zero outputs the constant zero (filter, bias, norm scale and shift vanish together), whatever its
readers' weights are, so this is enough for removal.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

from actprune.graph import Graph


@dataclass(frozen=True, eq=False)
class Piece:
    """The slices of one parameter that belong to the units of one group."""

    param: Tensor
    dim: int
    positions: Tensor
    """(U, k) int64 positions of every unit along ``dim``."""
    within: tuple[tuple[int, Tensor], ...] = ()
    """(other dim, positions): only these along the other dim; the rest has another owner."""

    @cached_property
    def whole(self) -> bool:
        """Whether the units cut the whole parameter into consecutive equal parts."""
        consecutive = torch.arange(self.param.shape[self.dim], device="cpu")
        return not self.within and torch.equal(self.positions.flatten().cpu(), consecutive)

    @cached_property
    def extent(self) -> tuple[int, int, int]:
        """Elements before, units, elements after: of the parameter if it is whole, else of what ``of`` gathers."""
        shape = list(self.param.shape)
        units, k = self.positions.shape
        if self.whole:
            return math.prod(shape[: self.dim]), units, k * math.prod(shape[self.dim + 1 :])
        for dim, positions in self.within:
            shape[dim] = len(positions)
        return 1, units, k * math.prod(shape[: self.dim] + shape[self.dim + 1 :])

    def of(self, tensor: Tensor) -> Tensor:
        """Elements of a tensor shaped like the parameter: all of it if whole, else gathered with the units first."""
        return tensor if self.whole else tensor[self.where(tensor.device)]

    def put_(self, values: Tensor) -> None:
        """Write what ``of`` gives back into the parameter."""
        if self.whole:
            self.param.copy_(values.view(self.param.shape))
        else:
            where = self.where(self.param.device)
            shape = torch.broadcast_shapes(*(index.shape for index in where))
            self.param[where] = values.view(shape).to(self.param.dtype)

    def where(self, device: torch.device) -> tuple[Tensor, ...]:
        """One index per dim that broadcast together to (U, k, other dims)."""
        chosen = dict(self.within)
        others = [dim for dim in range(self.param.ndim) if dim != self.dim]
        index: list[Tensor] = [self.positions] * self.param.ndim
        index[self.dim] = self.positions[(..., *[None] * len(others))]
        for place, dim in enumerate(others):
            positions = chosen.get(dim, torch.arange(self.param.shape[dim], device="cpu"))
            index[dim] = positions[(..., *[None] * (len(others) - 1 - place))]
        return tuple(i.to(device) for i in index)


@dataclass(frozen=True, eq=False)
class RowGroup:
    """Interchangeable units; row u is everything that unit u owns, over all pieces."""

    name: str
    pieces: tuple[Piece, ...]

    @property
    def size(self) -> int:
        """Number of units U."""
        return len(self.pieces[0].positions)

    @property
    def row_length(self) -> int:
        """Elements of one unit."""
        return sum(before * after for before, _, after in (piece.extent for piece in self.pieces))

    def rows(self) -> list[Tensor]:
        """The elements of every unit, (U, n_elements) per piece, without gradient."""
        parts = [piece.of(piece.param.detach()).reshape(piece.extent) for piece in self.pieces]
        return [part.transpose(0, 1).flatten(1) for part in parts]

    def zeros(self) -> Tensor:
        """Which units are exactly zero, (U,) bool."""
        return ~torch.stack([row.ne(0).any(1).cpu() for row in self.rows()]).any(0)


def input_groups(params: Iterable[Tensor]) -> tuple[RowGroup, ...]:
    """The paper's groups: dim 1 of every parameter with two dims or more; biases and norms are left alone.

    A lone input channel is no choice (a depthwise filter, the first layer on grey images): there each filter (dim 0)
    is a unit.
    """
    groups = []
    for number, param in enumerate(params):
        if param.ndim < 2:
            continue
        dim = 1 if param.shape[1] > 1 else 0
        positions = torch.arange(param.shape[dim], device="cpu").unsqueeze(1)
        groups.append(RowGroup(f"{number}.dim{dim}", (Piece(param, dim, positions),)))
    return tuple(groups)


def unit_groups(model: nn.Module, graph: Graph, frozen: bool = False) -> tuple[RowGroup, ...]:
    """Everything that leaves with a unit, each element with one owner; see the module's text for the rule.

    Locked groups, buffers and, unless ``frozen``, parameters without gradient are left out. A tied parameter counts once.
    Surgery makes new parameters: call this again afterwards and hand the result to ``optimizer.regroup``.
    """
    params = {name: p for name, p in model.named_parameters(remove_duplicate=False) if p.requires_grad or frozen}
    read = {id(params[c.weight]): c.reads_dim for c in graph.consumers if c.weight in params}
    claims: dict[int, list[tuple[int, Tensor, int]]] = {}
    for number, group in enumerate(graph.groups):
        for (name, dim), array in group.members.items():
            if name in params and not group.locked:
                claims.setdefault(id(params[name]), []).append((dim, torch.as_tensor(array, device="cpu"), number))

    pieces: list[list[Piece]] = [[] for _ in graph.groups]
    for param in {id(p): p for p in params.values()}.values():
        mine = claims.get(id(param), [])
        taken: dict[int, list[Tensor]] = {}
        for dim in sorted({claim[0] for claim in mine}, key=lambda d: (d == read.get(id(param)), d)):
            within = tuple((other, _rest(param.shape[other], positions)) for other, positions in taken.items())
            for claimed_dim, positions, number in mine:
                if claimed_dim != dim or _claimed(positions, taken.get(dim, [])):
                    continue
                taken.setdefault(dim, []).append(positions)
                if all(len(rest) for _, rest in within):
                    pieces[number].append(Piece(param, dim, positions, within))
    return tuple(RowGroup(g.name, tuple(own)) for g, own in zip(graph.groups, pieces, strict=True) if own)


def zero_units(groups: Sequence[RowGroup]) -> dict[str, Tensor]:
    """Which units of every group are exactly zero: name -> (U,) bool."""
    return {group.name: group.zeros() for group in groups}


def _claimed(positions: Tensor, earlier: Sequence[Tensor]) -> bool:
    """Whether the same claim was made before, under the other name of a tied parameter."""
    return any(torch.equal(positions, before) for before in earlier)


def _rest(size: int, taken: Sequence[Tensor]) -> Tensor:
    """Positions in range(size) that nobody took."""
    free = torch.ones(size, dtype=torch.bool, device="cpu")
    for positions in taken:
        free[positions.flatten()] = False
    return free.nonzero().flatten()
