"""What criteria learn from the moments that compensation observes: who reads a group, and what an error is worth there.

An output's error counts in the units in which the network goes on: after the batch norm that alone reads it, |gamma| /
sqrt(var + eps). It is compared with the variance of what the next layer reads of these outputs, so that an error in a residual
stream is measured by the stream and not by the branch it came from; where no batch norm or no next layer is known, with the
variance of the outputs themselves.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from actprune.compensation import Layer
from actprune.core.views import Reader, Statistic
from actprune.graph import Consumer, Graph, Group
from actprune.pruning.observe import Observation
from actprune.statistics import Gram


def readers_of(model: nn.Module, graph: Graph, observation: Observation, group: Group) -> list[Reader]:
    """The observed layers that read units of a group, in execution order."""
    found = []
    for number, (layer, statistic) in observation.folds.items():
        consumer = graph.consumers[number]
        channels = _channels(consumer, group)
        if channels is None:
            continue
        covariance = _covariance(statistic)
        weight = _weight(model, consumer, layer)  # (out, C, taps)
        width = weight.shape[1] * weight.shape[2]
        if len(covariance) == width:
            taps = weight.shape[2]
            columns = (torch.from_numpy(channels).unsqueeze(2) * taps + torch.arange(taps, device="cpu")).flatten(1)
            weight = weight.flatten(1)
        else:
            # moments of channels only: every tap is an output of its own
            columns, weight = torch.from_numpy(channels), weight.movedim(2, 1).flatten(0, 1)
        weight = weight.to(covariance.device)
        found.append(Reader(weight, covariance, columns, _size(graph, observation, number, weight, covariance)))
    return found


def _channels(consumer: Consumer, group: Group) -> np.ndarray | None:
    """(U, k) channels of the consumer's input that belong to each unit."""
    rows = [np.flatnonzero(consumer.reads == cls) for cls in group.classes]
    width = len(rows[0])
    return np.stack(rows) if width and all(len(row) == width for row in rows) else None


def _covariance(statistic: Statistic) -> Tensor:
    values = statistic.compute()
    return values[:, 1:] if isinstance(statistic, Gram) else torch.diag(values[:, 1])


def _weight(model: nn.Module, consumer: Consumer, layer: Layer) -> Tensor:
    weight = layer.weight.detach()
    weight = (weight.abs() if weight.is_complex() else weight).double().movedim(layer.reads_dim, 1)
    weight = weight.reshape(*weight.shape[:2], -1)
    if consumer.batch_norm is not None:
        norm: Any = model.get_submodule(consumer.batch_norm)
        scale = (norm.running_var.double() + norm.eps).rsqrt()
        if norm.weight is not None:
            scale = scale * norm.weight.detach().double().abs()
        weight = weight * scale.to(weight.device)[:, None, None]
    return weight


def _size(graph: Graph, observation: Observation, number: int, weight: Tensor, covariance: Tensor) -> float:
    consumer = graph.consumers[number]
    if consumer.batch_norm is not None and consumer.writes is not None:
        written = consumer.writes[consumer.writes >= 0]
        for later, (_, statistic) in observation.folds.items():
            if later <= number:
                continue
            reads = graph.consumers[later].reads
            mine = np.isin(reads, written)
            if mine.any():
                variance = _variances(statistic).reshape(len(reads), -1).mean(1).cpu()
                size = float(variance[torch.from_numpy(mine)].sum())
                if size > 0:
                    return size
    return float(((weight @ covariance) * weight).sum())


def _variances(statistic: Statistic) -> Tensor:
    values = statistic.compute()
    return values[:, 1:].diagonal() if isinstance(statistic, Gram) else values[:, 1]
