"""What a trace notes down: contractions, and attributes that follow a width."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from actprune.graph.ids import Ids


@dataclass
class Contraction:
    """One multiply-add operator: which ids it sums over, which it produces, how many multiply-adds it does."""

    module: str
    """Path of the innermost module that was running."""
    call: int
    """How many calls of the module were made before this one."""
    ordinal: int
    """How many contractions this call of the module had run before this one."""
    operand: int
    """Position of the activation among the operator's arguments."""
    dim: int
    """The operand's dimension that is summed over, from the end: a linear layer runs as ``mm`` here and as ``bmm`` there."""
    reads: Ids
    """Ids of the operand along ``dim``."""
    writes: Ids
    """Ids of the output channels."""
    macs: int
    """Multiply-adds that no width changes (batch, positions, kernel)."""
    widths: list[NDArray[np.int64]]
    """Id arrays whose kept lengths multiply ``macs``."""
    weight: str | None = None
    """Name of the weight parameter, if the other operand is one (possibly transposed)."""
    weight_reads: int = 1
    """The weight's dimension that is summed over."""
    bias: str | None = None
    """Name of the bias parameter."""
    batch_norm: str | None = None
    """Path of the batch norm that alone reads the output."""
    readers: int = 0
    """How many operators read the output."""
    training: bool = False
    """Runs in training mode only: tied and cut, but neither counted nor observed."""
    observed: bool = True
    """Whether what it reads can be watched: a recurrent layer's states cannot."""


@dataclass
class Binding:
    """An attribute of a module whose value must follow the cut."""

    module: str
    attribute: str
    index: int | None
    """Position inside a tuple or list attribute, or None for an int."""
    counts: NDArray[np.int64]
    """One id per counted thing: the attribute's new value is how many of them stay."""
    assumed: bool = False
    """Follows because it is equal and called a width, which may be chance: a rehearsal tells whether anything needs it."""
    alone: bool = False
    """One number of a list, whatever the others are: of widths that stand there layer by layer."""

    @property
    def name(self) -> str:
        """What it is called among the module's integers."""
        return f"{self.attribute}[{self.index}]" if self.alone else self.attribute
