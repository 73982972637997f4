"""What a removed channel leaves behind in the masked network: zeros, or something that a sum over channels would count.

A channel is zero where its weights are, stays so through a ReLU or a product, and is 0.5 after a sigmoid, 1 after ``exp``
and a share after a softmax over positions. The cut network sums what stays, so such a sum over channels is locked, unless
the code divides it by how many it summed: then it is a mean of what stays. Every pointwise operator is asked itself, with
zeros for the channels that have left. ``TraceState.sums`` holds such sums until something reads them; ``TraceState.means``
remembers where one was divided by its count, for a rehearsal to see that the number follows.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from math import isclose
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from actprune.core.hooks import CONTRACTIONS, named_arguments
from actprune.core.numbers import numbers

if TYPE_CHECKING:
    from actprune.graph.ids import Ids
    from actprune.graph.state import TraceState

_SUMS = {"sum", "linalg_vector_norm", "norm"}
_PRODUCTS = {"mm", "bmm", "addmm", "baddbmm"}
# weights and biases of channels that have left are zero, and a norm over channels is one over those that stay
_CONVOLUTIONS = {"convolution", "deform_conv2d"}
_CHANNEL_NORMS = {
    "native_batch_norm", "_native_batch_norm_legit", "_native_batch_norm_legit_no_training", "_batch_norm_impl_index",
    "cudnn_batch_norm", "native_group_norm", "batch_norm",
}  # fmt: skip
_LAST_NORMS = {"native_layer_norm", "_fused_rms_norm", "layer_norm"}
_RESTORING = (CONTRACTIONS - _PRODUCTS - _CONVOLUTIONS) | {
    "zeros", "new_zeros", "zeros_like", "empty", "new_empty", "empty_like", "zero_",
}  # fmt: skip
_FILLING = {"ones", "full", "rand", "randn", "new_ones", "new_full", "ones_like", "full_like", "rand_like", "randn_like"} | {
    "normal_", "uniform_", "softmax", "_softmax", "log_softmax", "_log_softmax", "_safe_softmax", "fill_",
}  # fmt: skip
UNTAGGED = {"rsub", "log_sigmoid_forward", "hardswish", "floor_divide"}
"""Pointwise operators that PyTorch does not tag."""
# zero times anything, and functions of one number that are zero at zero: not asked, for they are most of all there are
_KEEPING = {"mul", "relu", "gelu", "silu", "tanh", "neg", "leaky_relu"}
VIEWS = {"view", "_unsafe_view", "unsqueeze", "squeeze", "expand", "alias", "detach", "permute", "transpose", "_to_copy"}
"""Operators whose result is their operand, in another shape or type."""
_WHY = "summed where what has left would not be zero ({})"
_PROBES = (0.7, -1.3)
_MOST = 10_000
_answers: dict[Any, bool] = {}


class Sum(NamedTuple):
    """A sum or norm over channels that leave more than zeros."""

    ids: list[NDArray[np.int64]]
    n: int
    """How many were summed."""
    powers: tuple[int, int]
    """What the number that makes a mean of it is of ``n``: a norm is divided by the root."""
    why: str
    """The reason of the lock, once it is read as anything but a mean."""


def follow(
    t: TraceState,
    func: Any,
    name: str,
    args: Any,
    kwargs: Any,
    inputs: Sequence[Tensor],
    outputs: Sequence[Tensor],
    pointwise: bool,
) -> None:
    """Note of an operator's outputs whether removed channels are zero there.

    Args:
        t: the trace.
        func: the operator.
        name: its name.
        args: what it was given.
        kwargs: the same, by name.
        inputs: the tensors among them.
        outputs: its results.
        pointwise: whether it computes every position by itself.
    """
    if not outputs:
        return
    if name in _FILLING:
        with_value = name in ("full", "new_full", "full_like", "fill_")
        left = with_value and 0 in numbers(func, args, kwargs)[:1]
    elif name in _RESTORING:
        left = True
    elif name in _PRODUCTS:
        left = _product(t, *args[-2:]) and (len(args) < 3 or _sum(t, args[0], outputs[0]))
    elif name in _CONVOLUTIONS | _CHANNEL_NORMS | _LAST_NORMS:
        left = _layer(t, func, name, args, kwargs, outputs[0])
        if name in _CONVOLUTIONS and t.remains.get(args[1]) is False:
            left = _kernel(t, name, args, outputs[0]) and left
    elif name == "constant_pad_nd":
        left = len(args) < 3 or args[2] == 0
    elif pointwise:
        left = (name.rstrip("_") in _KEEPING and _is_zeroed(t, args[0])) or _asked(t, func, args, kwargs)
    else:
        left = not len(t.remains) or not any(one is False for one in t.remains.each(inputs))
    if name in VIEWS and len(t.sums) and (pending := t.sums.get(inputs[0])) is not None:
        t.sums[outputs[0]] = pending
    for out in outputs:
        if left:
            t.remains.pop(out)
        else:
            t.remains[out] = False


def reduced(t: TraceState, name: str, source: Tensor, dims: set[int], out: Tensor) -> None:
    """A sum or norm over channels that leave more than zeros: locked once read as anything but a mean."""
    if name in _SUMS and t.remains.get(source) is False:
        summed = [ids for d, ids in enumerate(t.ids(source)) if d in dims and ids is not None]
        if summed:
            powers = (1, -1) if name == "sum" else (2, -2)
            t.sums[out] = Sum(summed, source.numel() // max(out.numel(), 1), powers, _WHY.format(t.where))


def read(t: TraceState, name: str, given: Sequence[float | complex], inputs: Sequence[Tensor]) -> None:
    """Lock what the sums among an operator's inputs summed, unless it divides one by its count (one less: of a variance)."""
    for tensor in inputs if len(t.sums) and name not in VIEWS else ():
        if (pending := t.sums.get(tensor)) is not None:  # kept: what reads it next may not divide
            if name.rstrip("_") in ("div", "mul") and any(_counts(n, pending) for n in given):
                t.divides(pending.n, pending.ids)
                if name.endswith("_"):
                    t.sums.pop(tensor)  # is a mean now
                continue
            for ids in pending.ids:
                t.space.lock(ids, pending.why)


def _counts(number: float | complex, summed: Sum) -> bool:
    if isinstance(number, complex) or number <= 0:
        return False
    return any(isclose(number**power, n) for power in summed.powers for n in (summed.n, summed.n - 1) if n > 0)


def _product(t: TraceState, a: Tensor, b: Tensor) -> bool:
    """Whether rows and columns that have left are zero in ``a @ b``."""
    rows, columns = (t.remains.get(x) is False for x in (a, b))
    left, right = t.ids(a), t.ids(b)
    batch = any(ids is not None for ids in (*left[:-2], *right[:-2]))
    return not ((rows and left[-2] is not None) or (columns and right[-1] is not None) or (rows and columns and batch))


def _sum(t: TraceState, added: Tensor, out: Tensor) -> bool:
    """Whether what is added to a product is zero along every dimension whose positions may have left."""
    beside = [None] * (out.dim() - added.dim()) + t.ids(added)
    along = zip(t.ids(out), beside, strict=True)
    return _is_zeroed(t, added) and all(b is not None or not _may_leave(t, a) for a, b in along)


def _layer(t: TraceState, func: Any, name: str, args: Any, kwargs: Any, out: Tensor) -> bool:
    """Whether a layer gives zero where its channels have left, and where positions have that it does not write itself."""
    if t.is_weight(args[0]):  # standardised: over what stays of it
        return True
    own = range(out.dim() - len(args[1]), out.dim()) if name in _LAST_NORMS else (1,)
    if not any(d not in own and _may_leave(t, ids) for d, ids in enumerate(t.ids(out))):
        return True
    biased = named_arguments(func, args, kwargs).get("bias") is not None
    return name not in _CHANNEL_NORMS and not biased and t.remains.get(args[0]) is None


def _kernel(t: TraceState, name: str, args: Any, out: Tensor) -> bool:
    """Whether a convolution with a kernel that is not zero where channels have left gives zero there; locks what it sums."""
    x_left = t.remains.get(args[0]) is None
    if name == "convolution" and args[8] == args[0].shape[1] > 1:  # of every channel by itself
        return x_left
    if not x_left and (ids := t.ids(args[0])[1]) is not None:
        t.space.lock(ids, _WHY.format(t.where))
    return not _may_leave(t, t.ids(out)[1])


def _may_leave(t: TraceState, ids: Ids) -> bool:
    return ids is not None and bool((ids >= 0).any()) and not t.space.locked(ids)


def _asked(t: TraceState, func: Any, args: Any, kwargs: Any) -> bool:
    """Whether a pointwise operator gives zero for what has left, whatever stands in operands without channels."""
    given = (*args, *kwargs.values())
    key = func, tuple(kwargs), tuple(_kind(t, x) if isinstance(x, Tensor) else x for x in given)
    if len(_answers) > _MOST:
        _answers.clear()
    try:
        if key not in _answers:
            _answers[key] = all(_is_zero(func, key[2], len(args), tuple(kwargs), probe) for probe in _PROBES)
    except TypeError:  # lists among the arguments
        return True
    return _answers[key]


class _Operand(NamedTuple):
    """A tensor that an operator is given: zero where a channel has left, a constant of one element, or anything."""

    dtype: torch.dtype
    value: float | None

    def one(self, probe: float) -> Tensor:
        """One element of it."""
        number = probe if self.value is None else self.value
        return torch.tensor([number > 0 if self.dtype == torch.bool else number]).to(self.dtype)


def _is_zeroed(t: TraceState, x: Any) -> bool:
    """Whether a tensor has channels, and those that have left are zero."""
    return isinstance(x, Tensor) and t.remains.get(x) is None and any(ids is not None for ids in t.ids(x))


def _kind(t: TraceState, x: Tensor) -> _Operand:
    if _is_zeroed(t, x):
        return _Operand(x.dtype, 0.0)
    if x.dim() == 0 and t.remains.get(x) is None and type(x) is Tensor and x.device.type == "cpu" and not x.is_complex():
        with suppress(RuntimeError):  # inside of ``vmap`` it has many values
            return _Operand(x.dtype, float(x.item()))
    return _Operand(x.dtype, None)


def _is_zero(func: Any, kinds: tuple[Any, ...], positional: int, names: tuple[str, ...], probe: float) -> bool:
    try:
        given = [x.one(probe) if isinstance(x, _Operand) else x for x in kinds]
        out = func(*given[:positional], **dict(zip(names, given[positional:], strict=True)))
        first = out[0] if isinstance(out, (tuple, list)) else out
        return not bool(first.any())
    except Exception:
        return True  # not to be asked with one element: taken for one that keeps zeros
