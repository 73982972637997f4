"""Recurrent layers as wholes: gates, hidden units and what reads them, whatever kernels run and however long the sequence.

Every layer and direction computes, step by step, gates ``W_ih x + b_ih`` and ``W_hh h + b_hh``: G blocks of H rows each
(LSTM 4, GRU 3, plain 1), from which H units come; a projected LSTM hands on ``W_hr`` times them. PyTorch keeps one width for
all layers and directions, so unit ``i`` of all of them leaves together: its G rows, and its column in all that reads it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from actprune.graph.ids import Ids
from actprune.graph.rules.contraction import known
from actprune.graph.rules.registry import rule
from actprune.graph.state import TraceState

GATES = {torch.lstm: 4, torch.gru: 3, torch.rnn_tanh: 1, torch.rnn_relu: 1}
"""What ``torch.nn`` calls -> blocks of rows."""
_FORWARDS = (nn.LSTM.forward, nn.GRU.forward, nn.RNN.forward)


def is_recurrent(module: nn.Module) -> bool:
    """Whether a module runs what PyTorch's recurrent layers run: subclasses do unless they have a forward of their own."""
    return isinstance(module, nn.RNNBase) and type(module).forward in _FORWARDS


@dataclass
class Call:
    """Arguments of one call."""

    x: Tensor
    """(T, B, I), (B, T, I), or packed (N, I)."""
    states: list[Tensor]
    """Hidden (layers * directions, B, H or projected), then of an LSTM cells (layers * directions, B, H)."""
    cells: list[list[Tensor]]
    """Of every layer and direction ``W_ih, W_hh``, then the biases if there are any, then ``W_hr`` if it is projected."""
    biased: bool
    directions: int
    batch: int | None
    """The dimension of ``x`` that counts sequences; None where they are packed."""
    gates: int

    @classmethod
    def of(cls, function: Any, args: Sequence[Any]) -> Call:
        """Tell arguments by their places, which differ for packed sequences."""
        packed = not isinstance(args[3], bool)
        x, hidden, weights, biased, layers, _, _, bidirectional = [args[0], *args[2:]] if packed else args[:8]
        directions = 1 + bidirectional
        each = len(weights) // (layers * directions)
        cells = [list(weights[i : i + each]) for i in range(0, len(weights), each)]
        batch = None if packed else 0 if args[8] else 1
        states = [hidden] if isinstance(hidden, Tensor) else list(hidden)
        return cls(x, states, cells, biased, directions, batch, GATES[function])

    @property
    def tensors(self) -> list[Tensor]:
        """Everything that is read."""
        return [self.x, *self.states, *(weight for cell in self.cells for weight in cell)]


def recurrent(t: TraceState, a: Call, out: Sequence[Tensor]) -> None:
    """Tie what one call reads and writes, and set the ids of its outputs: all steps, then hidden states, then cells."""
    x = t.ids(a.x)
    for d, ids in enumerate(x[:-1]):
        if d != a.batch:
            t.lock(ids, "steps of a recurrent layer")
    sequences = None if a.batch is None else x[a.batch]
    widths: list[tuple[Ids, Ids]] = []
    reads = x[-1]
    for number, cell in enumerate(a.cells):
        if number and number % a.directions == 0:
            reads = _side_by_side(widths[0][0], a.directions)
        widths.append(_cell(t, a, cell, reads, number < a.directions, out[0]))
        for one, two in zip(widths[0], widths[-1], strict=True):
            t.tie(one, two, "one width for all layers and directions")
    for state, width in zip(a.states, widths[0], strict=False):
        layers, batch, units = t.ids(state)
        t.lock(layers, "layers by number")
        t.tie(width, units)
        if state.shape[1] > 1:
            sequences = t.meet([sequences, batch])
    steps: list[Ids] = [None] * (out[0].dim() - 1)
    if a.batch is not None:
        steps[a.batch] = sequences
    t.set(out[0], [*steps, _side_by_side(widths[0][0], a.directions)])
    for state, width in zip(out[1:], widths[0], strict=False):
        t.set(state, [None, sequences, width])


def _side_by_side(ids: Ids, directions: int) -> Ids:
    return None if ids is None else np.tile(ids, directions)


def _cell(t: TraceState, a: Call, cell: list[Tensor], reads: Ids, outer: bool, out: Tensor) -> tuple[Ids, Ids]:
    """Ids of what one layer and direction hands on, and of its units; ``outer``: it reads what the module is given."""
    w_ih, w_hh = cell[:2]
    biases = cell[2:4] if a.biased else []
    rows, columns = t.ids(w_ih)
    units: Ids = None
    if rows is not None:
        blocks = rows.reshape(a.gates, -1)
        t.tie_all(blocks[:1], blocks)
        units = blocks[0]
    t.tie(rows, t.ids(w_hh)[0])
    for one in biases:
        t.tie(rows, t.ids(one)[0])
    t.tie(reads, columns)
    projected = len(cell) % 2 == 1
    handed = t.ids(cell[-1])[0] if projected else units
    if projected:
        t.tie(units, t.ids(cell[-1])[1])
    t.tie(handed, t.ids(w_hh)[1])
    products = [(w_ih, reads, rows), (w_hh, handed, rows), *([(cell[-1], units, handed)] if projected else [])]
    n = a.x.numel() // max(a.x.shape[-1], 1)
    for weight, read, writes in products:
        summed = t.ids(weight)[1]
        operand = known(read, summed)
        sizes = [(weight.shape[0], writes), (weight.shape[1], operand)]
        first = weight is w_ih
        bias = biases[0] if biases and first else None
        t.contract(out, (0, -1, operand), writes, sizes, n, weight, summed, bias, observed=first and outer)
    return handed, units


@rule("_pack_padded_sequence")
def pack(t: TraceState, a: Any, out: Sequence[Tensor]) -> None:
    """Sequences one after another, step by step: channels pass."""
    ids = t.ids(a.input)
    for dim in ids[:2]:
        t.lock(dim, "steps and sequences that are packed")
    t.set(out[0], [None, *ids[2:]])
