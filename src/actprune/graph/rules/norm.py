"""Normalisation: parameters and running statistics are tied to the channels they scale."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from actprune.graph.ids import Ids
from actprune.graph.records import Binding
from actprune.graph.rules.registry import rule
from actprune.graph.state import TraceState


def tie_along(t: TraceState, a: SimpleNamespace, dim: int, *names: str) -> None:
    """Tie the arguments that hold one number per position of a dimension of the input to those positions."""
    for name in names:
        tensor = getattr(a, name, None)
        along = a.input.shape[dim] if -a.input.dim() <= dim < a.input.dim() else None  # an axis that is set and not used
        if isinstance(tensor, Tensor) and tensor.dim() == 1 and tensor.shape[0] == along:
            t.tie(t.ids(a.input)[dim], t.ids(tensor)[0])


@rule(
    "native_batch_norm",
    "_native_batch_norm_legit",
    "_native_batch_norm_legit_no_training",
    "cudnn_batch_norm",
    "miopen_batch_norm",
    "_batch_norm_no_update",
)
def batch_norm(t: TraceState, a: SimpleNamespace, out: Any) -> None:
    """Channels are dimension 1; each is normalised alone."""
    x = t.ids(a.input)
    tie_along(t, a, 1, "weight", "bias", "running_mean", "running_var")
    t.set(out[0], x)
    if x[1] is not None:
        # instance norm sees (1, N C) here: its C ids stand there N times
        for name, width in t.integers(t.stack[-1]):
            if name == "num_features" and width <= len(x[1]):
                t.bindings.append(Binding(t.stack[-1], name, None, x[1][:width]))
    producer = t.producer(a.input)
    mean = getattr(a, "running_mean", None)
    if producer is None or not isinstance(mean, Tensor) or x[1] is None or producer.writes is None:
        return
    # it normalises what was produced: not another dimension of the same tensor, tokens for one
    if np.array_equal(x[1], producer.writes) and (origin := t.origin(mean)) is not None:
        producer.batch_norm = origin.rpartition(".")[0]


@rule("native_layer_norm", "_fused_rms_norm", "rms_norm")
def layer_norm(t: TraceState, a: SimpleNamespace, out: Any) -> None:
    """Normalises over the trailing dimensions; what stays is normalised over what stays."""
    x = t.ids(a.input)
    for name in ("weight", "bias"):
        tensor = getattr(a, name, None)
        if isinstance(tensor, Tensor):
            for dim in range(1, tensor.dim() + 1):
                t.tie(x[-dim], t.ids(tensor)[-dim])
    _bind_shape(t, list(a.normalized_shape), x)
    t.set(out[0] if isinstance(out, (tuple, list)) else out, x)


def _bind_shape(t: TraceState, shape: list[int], x: list[Ids]) -> None:
    for path, name, value in t.attributes():
        if isinstance(value, (tuple, list)) and list(value) == shape:
            for index in range(len(shape)):
                ids = x[index - len(shape)]
                if ids is not None:
                    t.bindings.append(Binding(path, name, index, ids))
            return


@rule("native_group_norm")
def group_norm(t: TraceState, a: SimpleNamespace, out: Any) -> None:
    """Every group keeps the same width: position ``i`` of all groups leaves together; or groups that are heads leave whole."""
    x = list(t.ids(a.input))
    tie_along(t, a, 1, "weight", "bias")
    if x[1] is not None and a.group > 1:
        rows = x[1].reshape(a.group, -1)
        if not _leave_whole(t, rows):
            t.tie_all(rows[:1], rows)
    t.set(out[0], x)


def _leave_whole(t: TraceState, rows: NDArray[np.int64]) -> bool:
    """Whether every group is one unit already, and the module that counts the groups can count fewer."""
    path = t.stack[-1]
    if not isinstance(t.modules[path], nn.GroupNorm) or (rows < 0).any():
        return False
    roots = t.space.find(rows)
    if (roots != roots[:, :1]).any() or len(np.unique(roots)) == 1:
        return False
    t.bindings.append(Binding(path, "num_groups", None, rows[:, 0]))
    return True


@rule("_weight_norm_interface")
def weight_norm(t: TraceState, a: SimpleNamespace, out: Any) -> None:
    """``g v / ||v||``: the scale ``g`` is tied to the kept dimension of ``v``."""
    v, g = t.ids(a.v), t.ids(a.g)
    t.tie(v[a.dim], g[a.dim])
    t.set(out[0], v)
