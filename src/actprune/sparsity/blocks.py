"""The elements of many units as a few dense blocks, without reordering anything.

Parameters of one shape, cut along one dim, are stacked; a unit's sums are formed inside each block and added over the
blocks that hold a part of it. A network has as many blocks as different weight shapes, whatever its depth, and no
index per element is stored. Parameters that are cut at other than consecutive positions (a fused projection, a partly
locked dim) are gathered into a block of their own.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from actprune.core.errors import ConfigError
from actprune.sparsity.arena import Arena
from actprune.sparsity.groups import Piece, RowGroup

Arenas = dict[tuple[torch.device, torch.dtype], Arena]
_EMPTY = {"sum": 0.0, "amax": -math.inf, "amin": math.inf}


@dataclass(frozen=True, eq=False)
class _Stack:
    """Pieces that share a block of shape (L, A, U * B), or (L, U, B) where A = 1.

    L pieces, each with A elements before and B after its U units.
    """

    pieces: tuple[Piece, ...]
    numbers: tuple[int, ...]
    """Places of the pieces' parameters in the list of parameters."""
    before: int
    units: int
    after: int

    def read(self, tensors: Sequence[Tensor], arena: Arena, dtype: torch.dtype) -> Tensor:
        parts = [piece.of(tensors[n]) for piece, n in zip(self.pieces, self.numbers, strict=True)]
        shape = (self.units, self.after) if self.before == 1 else (self.before, self.units * self.after)
        if len(parts) == 1:
            return parts[0].reshape(1, *shape).to(dtype)
        parts = [part.reshape(shape).to(dtype) for part in parts]
        return torch.stack(parts, out=arena.take((len(parts), *shape)))

    def reduce(self, block: Tensor, how: str) -> Tensor:
        """(L * U,)."""
        if self.before > 1:
            block = getattr(block, how)(1).view(-1, self.units, self.after)
        return getattr(block, how)(-1).flatten() if self.after > 1 else block.flatten()

    def spread(self, values: Tensor) -> Tensor:
        """From (L * U,) to what broadcasts against the block with long inner loops."""
        if self.before == 1:
            return values.view(-1, self.units, 1)
        return values.view(-1, 1, self.units, 1).expand(-1, 1, self.units, self.after).reshape(len(self.pieces), 1, -1)


class Blocks:
    """The units of some groups, as a ``Layout`` for the proximal operators.

    Args:
        groups: groups whose parameters are on one device; each element belongs to one unit at most.
        arenas: memory for temporaries by device and dtype, shared with other blocks that are not in use at the same time.
    """

    def __init__(self, groups: Sequence[RowGroup], arenas: Arenas | None = None) -> None:
        self.params = list({id(piece.param): piece.param for group in groups for piece in group.pieces}.values())
        number_of = {id(param): number for number, param in enumerate(self.params)}
        self._dtype = torch.float32
        for param in self.params:
            self._dtype = torch.promote_types(self._dtype, param.dtype)
        device = self.params[0].device
        self._arena = ({} if arenas is None else arenas).setdefault((device, self._dtype), Arena(device, self._dtype))

        alike: dict[tuple[Any, ...], list[tuple[Piece, int]]] = {}
        first = 0
        for group in groups:
            for piece in group.pieces:
                key: tuple[Any, ...] = (piece.dim, tuple(piece.param.shape), piece.extent) if piece.whole else (id(piece),)
                alike.setdefault(key, []).append((piece, first))
            first += group.size
        self._stacks = []
        owners: list[Tensor] = []
        for members in alike.values():
            pieces = tuple(piece for piece, _ in members)
            self._stacks.append(_Stack(pieces, tuple(number_of[id(p.param)] for p in pieces), *pieces[0].extent))
            owners += [torch.arange(start, start + piece.extent[1], device="cpu") for piece, start in members]
        owner = torch.cat(owners)
        self._owner = owner.to(device)
        self._splits = [len(stack.pieces) * stack.units for stack in self._stacks]
        self._parts = _parts_of(owner, first).to(device)
        lengths = torch.cat([torch.full((group.size,), group.row_length, device="cpu") for group in groups])
        self.weights = lengths.to(device, self._dtype).sqrt()
        """sqrt(n) of every unit, (G,)."""

    def reset(self) -> None:
        """Take back all blocks that were read or lent."""
        self._arena.reset()

    @torch.no_grad()
    def read(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Blocks of tensors that are shaped like ``params``, in float32 or float64; they may be the tensors themselves."""
        return [stack.read(tensors, self._arena, self._dtype) for stack in self._stacks]

    def scratch(self, blocks: list[Tensor]) -> list[Tensor]:
        """Uninitialised blocks like these, valid until ``reset``."""
        return [self._arena.take(block.shape) for block in blocks]

    def write_(self, blocks: Sequence[Tensor]) -> None:
        """Put blocks back into the parameters; elements of no unit stay as they are."""
        targets, sources = [], []
        for stack, block in zip(self._stacks, blocks, strict=True):
            for piece, values in zip(stack.pieces, block.unbind(0), strict=True):
                if piece.whole:  # one multi-tensor copy for all of these
                    targets.append(piece.param)
                    sources.append(values.reshape(piece.param.shape))
                else:
                    piece.put_(values)
        if targets:
            torch._foreach_copy_(targets, sources)

    def reduce(self, blocks: Sequence[Tensor], how: str) -> Tensor:
        """Reduce over the elements of every unit, (G,)."""
        parts = [stack.reduce(block, how) for stack, block in zip(self._stacks, blocks, strict=True)]
        parts.append(parts[0].new_full((1,), _EMPTY[how]))
        table = torch.cat(parts)[self._parts]
        return getattr(table, how)(1) if table.shape[1] > 1 else table[:, 0]

    def spread(self, values: Tensor) -> list[Tensor]:
        """Values of every unit, (G,), in a shape that broadcasts against each block."""
        parts = values[self._owner].split(self._splits)
        return [stack.spread(part) for stack, part in zip(self._stacks, parts, strict=True)]


def _parts_of(
    owner: Tensor,  # (M,) unit of every part
    units: int,
) -> Tensor:
    """For every unit the places of its parts, (G, most parts of a unit), filled up with M."""
    counts = torch.bincount(owner, minlength=units)
    order = owner.argsort(stable=True)
    column = torch.arange(len(owner), device="cpu") - (counts.cumsum(0) - counts)[owner[order]]
    table = torch.full((units, int(counts.max())), len(owner), device="cpu")
    table[owner[order], column] = order
    return table


def check(groups: Sequence[RowGroup]) -> None:
    """Refuse units that cannot shrink side by side.

    Raises:
        ConfigError: an element belongs to two units, positions exceed the parameter, or the parameters of a group are on
            several devices.
    """
    owned: dict[int, Tensor] = {}
    for group in groups:
        devices = sorted({str(piece.param.device) for piece in group.pieces})
        if len(devices) > 1:
            raise ConfigError(
                f"group {group.name} lies on {len(devices)} devices ({', '.join(devices)}); a unit shrinks as one only on "
                "one device: give each device its own units"
            )
        for piece in group.pieces:
            if int(piece.positions.max()) >= piece.param.shape[piece.dim]:
                raise ConfigError(
                    f"group {group.name}: position {int(piece.positions.max())} exceeds dim {piece.dim} of a parameter "
                    f"of shape {tuple(piece.param.shape)}; after surgery call "
                    "optimizer.regroup(unit_groups(model, graph)) with the new graph"
                )
            marks = owned.setdefault(id(piece.param), torch.zeros(piece.param.shape, dtype=torch.int16, device="cpu"))
            marks.index_put_(piece.where(marks.device), torch.ones((), dtype=marks.dtype, device="cpu"), accumulate=True)
    twice = sum(int((marks > 1).sum()) for marks in owned.values())
    if twice:
        raise ConfigError(
            f"{twice} elements belong to two units; a proximal step needs one owner for each, as unit_groups gives"
        )
