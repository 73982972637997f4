"""Biases that compensation gives to layers without one count towards a budget of parameters."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping

import numpy as np
from numpy.typing import NDArray
from torch import nn

from actprune.compensation import Layer
from actprune.core.errors import BudgetError
from actprune.core.views import Statistic
from actprune.graph import Graph
from actprune.pruning.folded import takes_bias

_LOG = logging.getLogger(__name__)

Units = dict[str, list[int]]
Folds = Mapping[int, tuple[Layer, Statistic]]
"""Index of a consumer -> its layer and the statistic of its input."""


def with_room_for_biases(
    units: Units, select: Callable[[int], Units], target: float, model: nn.Module, graph: Graph, folds: Folds
) -> Units:
    """The units that leave, or more of them, so that what is left and the biases that are given stay within the target.

    Args:
        units: that leave where nothing is given.
        select: the units that leave where that many parameters less than the target may be left.
        target: how many parameters may be left.
        model: the model.
        graph: its channel graph.
        folds: where compensation folds.
    """
    while units:
        gone = graph.removed(units)
        given = biases_given(model, graph, gone, folds)
        over = graph.left("params", gone) + given - target
        if not given or over <= 0:
            break
        try:
            units = select(given)  # it grows with every turn, for what fits without it is over by what is new
        except BudgetError:
            _LOG.warning("compensation gives layers biases of %d parameters, %d of them beyond the budget", given, over)
            break
    return units


def biases_given(model: nn.Module, graph: Graph, gone: NDArray[np.bool_], folds: Folds) -> int:
    """Elements of the biases that layers without one are given once the marked classes have left."""
    gone, given = np.append(gone, False), {}
    for number, (layer, _) in folds.items():
        consumer = graph.consumers[number]
        if gone[consumer.reads].any() and not layer.weight.is_complex() and takes_bias(model, consumer):
            whole = layer.weight.shape[1 - consumer.reads_dim]
            given[consumer.module] = whole if consumer.writes is None else int((~gone[consumer.writes]).sum())
    return sum(given.values())
