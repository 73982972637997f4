"""Pointwise operators and copies: positions that meet under broadcasting leave together."""

from __future__ import annotations

import functools
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from actprune.graph.ids import Ids
from actprune.graph.rules.norm import tie_along
from actprune.graph.rules.registry import rule
from actprune.graph.state import TraceState


def broadcast(t: TraceState, operands: list[Tensor], shape: tuple[int, ...]) -> list[Ids]:
    """Tie the operands' ids where their positions meet, and return the ids of the broadcast result."""
    result: list[Ids] = []
    for dim in range(-len(shape), 0):
        meeting = []
        for tensor in operands:
            if tensor.dim() >= -dim and tensor.shape[dim] == shape[dim] and (shape[dim] != 1 or len(operands) == 1):
                meeting.append(t.ids(tensor)[dim])
        result.append(t.meet(meeting))
    return result


_UNTAGGED = {"rsub", "log_sigmoid_forward", "hardswish", "floor_divide", "complex", "polar"} | {
    "masked_fill",  # with a tensor's value
    "leaky_relu", "leaky_relu_", "_conj_physical",  # in PyTorch 2.6
}  # fmt: skip


@functools.cache
def is_pointwise(func: Any, name: str) -> bool:
    """PyTorch tags pointwise operators, but not every in-place twin or overload of one, and in 2.6 not all of them."""
    if torch.Tag.pointwise in func.tags or name in _UNTAGGED:
        return True
    twin = getattr(torch.ops.aten, name[:-1], None) if name.endswith("_") and not name.endswith("__") else None
    return twin is not None and any(torch.Tag.pointwise in getattr(twin, o).tags for o in twin.overloads())


def pointwise(t: TraceState, tensors: list[Tensor], outputs: list[Tensor]) -> None:
    """Any operator that PyTorch tags as pointwise."""
    for output in outputs:
        ids = broadcast(t, tensors, tuple(output.shape))
        t.set(output, ids)


@rule("clone", "detach", "alias", "_to_copy", "lift_fresh", "contiguous", "lift_fresh_copy", "positive", "bernoulli")
def copy(t: TraceState, a: SimpleNamespace, out: Tensor) -> None:
    """The output is the input, elsewhere in memory or of another dtype."""
    t.set(out, t.ids(a.input))
    t.inherit(a.input, out)


@rule("zeros_like", "ones_like", "empty_like", "full_like", "rand_like", "randn_like")
def like(t: TraceState, a: SimpleNamespace, out: Tensor) -> None:
    """A constant that takes its shape from a tensor follows that tensor."""
    t.set(out, t.ids(a.input))


@rule("copy_")
def copy_into(t: TraceState, a: SimpleNamespace, out: Tensor) -> None:
    """Writing into a tensor ties source and target."""
    t.set(out, broadcast(t, [a.input, a.src], tuple(out.shape)))


@rule("fill_", "zero_", "normal_", "uniform_", "bernoulli_")
def fill(t: TraceState, a: SimpleNamespace, out: Tensor) -> None:
    """Filling keeps the shape and its ids."""
    t.set(out, t.ids(a.input))


@rule("hardswish", "rrelu_with_noise", "rsub", "log_sigmoid_forward", "floor_divide", "_conj", "_neg_view")
def untagged(t: TraceState, a: SimpleNamespace, out: Any) -> None:
    """Pointwise operators that PyTorch does not tag."""
    outputs = [x for x in (out if isinstance(out, (tuple, list)) else (out,)) if x.shape == a.input.shape]
    pointwise(t, [a.input], outputs)


@rule(
    "fake_quantize_per_tensor_affine_cachemask",
    "_fake_quantize_per_tensor_affine_cachemask_tensor_qparams",
    "_fake_quantize_learnable_per_tensor_affine",
    "fake_quantize_per_channel_affine_cachemask",
    "_fake_quantize_learnable_per_channel_affine",
    "_fused_moving_avg_obs_fq_helper",
)
def fake_quantize(t: TraceState, a: SimpleNamespace, out: Any) -> None:
    """Rounded to a grid: one for all, or one per channel of an axis."""
    ids = t.ids(a.input)
    axis = getattr(a, "axis", getattr(a, "ch_axis", None))
    if axis is not None:
        tie_along(t, a, axis, "scale", "zero_point", "running_min", "running_max")
    for tensor in out if isinstance(out, (tuple, list)) else (out,):
        t.set(tensor, ids)


_TRIANGLE = "triangle of a matrix"


@rule("tril", "triu")
def triangle(t: TraceState, a: SimpleNamespace, out: Tensor) -> None:
    """What is above the diagonal is known by position: rows and columns leave together, for order among those that stay holds.

    Further from the diagonal it does not: what is two columns away may be one away after a cut.
    """
    rows, columns = t.ids(a.input)[-2:]
    ordered = a.diagonal in ((0, -1) if t.where.startswith("tril") else (0, 1))
    if ordered and _all_known(rows) and _all_known(columns) and out.shape[-1] == out.shape[-2]:
        t.tie(rows, columns, _TRIANGLE)
    else:
        t.lock(rows, _TRIANGLE)
        t.lock(columns, _TRIANGLE)
    t.set(out, t.ids(a.input))


def _all_known(ids: Ids) -> bool:
    return ids is not None and bool((ids >= 0).all())


@rule("_prelu_kernel")
def prelu(t: TraceState, a: SimpleNamespace, out: Tensor) -> None:
    """One slope for all channels or one per channel."""
    t.set(out, broadcast(t, [a.input, a.weight], tuple(out.shape)))


@rule("softmax", "_softmax", "log_softmax", "_log_softmax", "_safe_softmax")
def softmax(t: TraceState, a: SimpleNamespace, out: Tensor) -> None:
    """What is removed would have had a share, whatever it says: the dimension cannot be cut."""
    ids = list(t.ids(a.input))
    t.fix(ids, [a.dim] if ids else [], "share of a softmax")
    t.set(out, ids)


@rule("glu")
def glu(t: TraceState, a: SimpleNamespace, out: Tensor) -> None:
    """Value and gate halves of a dimension leave together."""
    ids = list(t.ids(a.input))
    if ids[a.dim] is not None:
        halves = ids[a.dim].reshape(2, -1)
        t.tie(halves[0], halves[1])
        ids[a.dim] = halves[0]
    t.set(out, ids)


@rule("native_dropout")
def dropout(t: TraceState, a: SimpleNamespace, out: Any) -> None:
    """Output and mask have the input's ids."""
    for tensor in out:
        t.set(tensor, t.ids(a.input))
