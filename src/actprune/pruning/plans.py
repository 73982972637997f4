"""Turn chosen units into a plan: positions of every tensor, attributes that follow, exact costs, compensation."""

from __future__ import annotations

import dataclasses
import logging
from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from actprune.compensation import Compensation
from actprune.core.copied import mirrored
from actprune.core.errors import SurgeryError
from actprune.core.plan import Plan, Positions
from actprune.graph import Graph
from actprune.pruning.apart import equal
from actprune.pruning.biases import biases_given
from actprune.pruning.folded import takes_bias
from actprune.pruning.observe import Observation

_LOG = logging.getLogger(__name__)


def draft(model: nn.Module, graph: Graph, units: Mapping[str, Iterable[int]]) -> Plan:
    """A plan without compensation.

    Args:
        model: the model the graph was traced on.
        graph: its channel graph.
        units: group name -> indices of the units that leave.

    Raises:
        SurgeryError: two widths that the code tells apart would become equal.
    """
    chosen = {name: np.fromiter(indices, dtype=np.int64) for name, indices in units.items()}
    gone = graph.removed({name: indices.tolist() for name, indices in chosen.items()})
    if (same := equal(graph, gone)) is not None:
        alone = ", or take an unbiased variance of one value" if isinstance(same.other, int) and same.other == 1 else ""
        raise SurgeryError(
            f"two widths that {same.module or 'the model'} finds different would both be {same.widths(gone)[0]}, and its code "
            f"would do something else then{alone}; let a unit more or fewer leave"
        )
    removed: Positions = defaultdict(dict)
    leaves = np.append(gone, False)
    for (tensor, dim), column in graph.columns.items():
        if len(positions := np.flatnonzero(leaves[column])):
            removed[tensor][dim] = positions.tolist()
    plan = Plan(
        removed=dict(removed),
        groups={name: len(indices) for name, indices in chosen.items() if len(indices)},
        attributes=_attributes(model, graph, gone),
        params_before=graph.params,
        params_after=graph.cost.evaluate("params", gone),
        macs_before=graph.macs,
        macs_after=graph.cost.evaluate("macs", gone),
    )
    return mirrored(plan, model, graph.copies)


def _attributes(model: nn.Module, graph: Graph, gone: np.ndarray) -> dict[str, dict[str, Any]]:
    values: dict[str, dict[str, Any]] = defaultdict(dict)
    for follower in graph.followers:
        new = follower.value(gone)
        if new == len(follower.counts):
            continue
        old = values[follower.module].get(follower.attribute)
        if follower.index is None:
            values[follower.module][follower.attribute] = new
        else:
            if old is None:
                old = list(getattr(model.get_submodule(follower.module), follower.attribute))
            old[follower.index] = new
            values[follower.module][follower.attribute] = old
    return {path: dict(named) for path, named in values.items() if named}


def compensated(
    plan: Plan,
    model: nn.Module,
    graph: Graph,
    units: Mapping[str, Iterable[int]],
    observation: Observation,
    how: Compensation,
) -> Plan:
    """Add to a plan what compensation folds into the layers that stay."""
    gone = graph.removed(units)
    biases: dict[int, list[Tensor]] = defaultdict(list)
    weights: dict[int, list[Tensor]] = defaultdict(list)
    first: dict[tuple[object, ...], int] = {}
    for number, (layer, statistic) in observation.folds.items():
        consumer = graph.consumers[number]
        leaves = np.append(gone, False)[consumer.reads]
        if not leaves.any():
            continue
        if layer.weight.is_complex():  # and what it reads: known is the mean of magnitudes
            _LOG.warning("%s: nothing is folded into complex weights", consumer.weight)
            continue
        fold = how.fold(layer, statistic, torch.from_numpy(leaves))
        # a layer that runs more than once has one bias: the mean over its calls; not over those who read its weight otherwise
        module = consumer.module if consumer.bias is None and consumer.batch_norm is None else None
        read = consumer.weight, consumer.reads_dim, module
        owner = first.setdefault((*read, consumer.bias, consumer.batch_norm), number)
        biases[owner].append(fold.bias)
        if fold.weight is not None:
            weights[owner].append(fold.weight)
    shifts: dict[str, Tensor] = {}
    new_biases: dict[str, Tensor] = {}
    for number, found in biases.items():
        consumer = graph.consumers[number]
        bias = torch.stack(found).mean(0).cpu()
        if weights[number]:
            shifts[consumer.weight] = torch.stack(weights[number]).mean(0).cpu()
        mean = f"{consumer.batch_norm}.running_mean" if consumer.batch_norm is not None else None
        if consumer.bias is not None:
            shifts[consumer.bias] = shifts.get(consumer.bias, 0) + bias
        elif mean is not None:
            shifts[mean] = shifts.get(mean, 0) - bias
        elif takes_bias(model, consumer):
            new_biases[consumer.module] = bias
        elif not weights[number]:
            _LOG.warning("%s: no mean is folded, for neither a bias nor a batch norm can take it", consumer.weight)
    params_after = plan.params_after + biases_given(model, graph, gone, observation.folds)
    plan = dataclasses.replace(plan, shifts=shifts, new_biases=new_biases, params_after=params_after)
    return mirrored(plan, model, graph.copies)
