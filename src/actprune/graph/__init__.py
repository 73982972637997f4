"""Channel graph: which units leave together, where they are read, what they cost."""

from __future__ import annotations

from torch import nn

from actprune.core.calling import Example
from actprune.graph.graph import Consumer, Follower, Graph, Group, Site
from actprune.graph.tracer import run
from actprune.graph.units import build

__all__ = ["Consumer", "Follower", "Graph", "Group", "Site", "trace"]


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
    return build(run(model, example_inputs), model)
