"""Channel graph: which units leave together, where they are read, what they cost."""

from __future__ import annotations

import copy
from collections.abc import Collection

from torch import nn

from actprune.core.calling import Example
from actprune.core.copied import NONE, Copies
from actprune.graph.graph import Apart, Consumer, Follower, Graph, Group, Site
from actprune.graph.rules.recurrent import is_recurrent
from actprune.graph.tracer import run
from actprune.graph.units import build

__all__ = ["Apart", "Consumer", "Follower", "Graph", "Group", "Site", "Trace", "is_recurrent", "trace"]


class Trace:
    """One run of a model, from which graphs with different ties are made.

    Args:
        model: any module.
        example_inputs: what it takes, see ``trace``.
        training: follow what it does in training mode as well, and not only where evaluation mode leaves parameters unused.
        copies: parts that take the cuts of others, see ``Pruner``.
        tells: keep the values that code reads, up to 64 MiB, for a rehearsal to be told.

    Raises:
        TraceError: the model fails on the example inputs.
    """

    def __init__(
        self,
        model: nn.Module,
        example_inputs: Example,
        training: bool = False,
        copies: Copies = NONE,
        tells: bool = False,
    ) -> None:
        self._model = model
        self._state = run(model, example_inputs, training, copies, tells)

    def graph(self, tied: Collection[str] = ()) -> Graph:
        """The channel graph.

        Args:
            tied: paths of modules that reshape to an extent of their own input: inside and outside leave together there; and
                ``path:attribute`` of integers that count several widths, which leave together.
        """
        state = copy.copy(self._state)
        state.space = self._state.space.copy()
        state.bindings = list(state.bindings)
        for path, _, attribute in (one.partition(":") for one in tied):
            if attribute:
                same = (b for b in state.possible if (b.module, b.name) == (path, attribute))
                state.bindings += [b for b in same if not state.space.locked(b.counts)]
                continue
            for inside, outside in state.coincidences.get(path, ()):
                state.space.tie(inside, outside, f"reshaped to the width of its input (view in {path})")
        return build(state, self._model)


def trace(model: nn.Module, example_inputs: Example) -> Graph:
    """Find every group of units of a model by running it once.

    The run is in evaluation mode, without gradients; mode, buffers, random number generators and hooks are left as they were.

    Args:
        model: any module.
        example_inputs: what the model takes: a tensor, a tuple of positional arguments, a dict of keyword arguments, a list
            as the one argument, or a callable that takes the model.

    Returns:
        The channel graph; ``str()`` of it is a table.

    Raises:
        TraceError: the model fails on the example inputs.
    """
    return Trace(model, example_inputs).graph()
