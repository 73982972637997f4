"""Channel graph: which units leave together, where they are read, what they cost."""

from __future__ import annotations

from collections.abc import Collection

from torch import nn

from actprune.core.calling import Example
from actprune.graph.graph import Consumer, Follower, Graph, Group, Site
from actprune.graph.tracer import run
from actprune.graph.units import build

__all__ = ["Consumer", "Follower", "Graph", "Group", "Site", "trace"]


def trace(model: nn.Module, example_inputs: Example, *, tied: Collection[str] = ()) -> Graph:
    """Find every group of units of a model by running it once.

    The run is in evaluation mode, without gradients; mode, buffers, random number generators and hooks are left as they were.

    Args:
        model: any module.
        example_inputs: what the model takes: a tensor, a tuple of positional arguments, a dict of keyword arguments, a list
            as the one argument, or a callable that takes the model.
        tied: paths of modules that reshape to an extent of their own input: inside and outside leave together there.

    Returns:
        The channel graph; ``str()`` of it is a table.

    Raises:
        TraceError: the model fails on the example inputs.
    """
    state = run(model, example_inputs)
    for path in tied:
        for inside, outside in state.coincidences.get(path, ()):
            state.space.tie(inside, outside, f"reshaped to the width of its input (view in {path})")
    return build(state, model)
