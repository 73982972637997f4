"""Sparsity during training: optimizers and a decay that bring whole units to zero."""

from actprune.sparsity.groups import Piece, RowGroup, input_groups, unit_groups, zero_units
from actprune.sparsity.optim import ProxAdam, ProxAdamW, ProxSGD
from actprune.sparsity.penalty import GroupLasso, GroupMCP, Penalty
from actprune.sparsity.serene import InsensitivityDecay

__all__ = [
    "GroupLasso",
    "GroupMCP",
    "InsensitivityDecay",
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
