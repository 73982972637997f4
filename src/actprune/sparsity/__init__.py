"""Sparsity during training: optimizers that bring whole units to exactly zero."""

from actprune.sparsity.groups import Piece, RowGroup, input_groups, unit_groups, zero_units
from actprune.sparsity.optim import ProxAdam, ProxAdamW, ProxSGD
from actprune.sparsity.penalty import GroupLasso, GroupMCP, Penalty

__all__ = [
    "GroupLasso",
    "GroupMCP",
    "Penalty",
    "Piece",
    "ProxAdam",
    "ProxAdamW",
    "ProxSGD",
    "RowGroup",
    "input_groups",
    "unit_groups",
    "zero_units",
]
