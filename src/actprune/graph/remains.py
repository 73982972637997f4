"""What a removed channel leaves behind in the masked network: zeros, or something that a sum over channels would count.

A channel is zero where its weights are, stays so through a ReLU or a product, and is 0.5 after a sigmoid, 1 after ``exp``
and a share after a softmax over positions. The cut network sums what stays, so such a sum over channels is locked, unless
the code divides it by how many it summed: then it is a mean of what stays. Every pointwise operator is asked itself, with
zeros for the channels that have left, the number that is known to stand there, or any numbers. ``TraceState.constants`` holds
the numbers that are known, ``TraceState.sums`` such sums until something reads them; ``TraceState.means`` remembers where one
was divided by its count, for a rehearsal to see that the number follows.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from math import isclose, isfinite
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from actprune.core.operands import CONTRACTIONS, named_arguments
from actprune.graph.ids import FREE, Ids
from actprune.graph.made import PICKS

if TYPE_CHECKING:
    from actprune.graph.state import TraceState

_SUMS = {"sum", "linalg_vector_norm", "norm"}
_PRODUCTS = {"mm", "bmm", "addmm", "baddbmm", "_sparse_addmm", "mv", "dot", "vdot"}
_DISTANCES = {"_euclidean_dist", "_cdist_forward"}
# weights and biases of channels that have left are zero, and a norm over channels is one over those that stay
_CONVOLUTIONS = {"convolution", "deform_conv2d"}
_CHANNEL_NORMS = {
    "native_batch_norm", "_native_batch_norm_legit", "_native_batch_norm_legit_no_training", "_batch_norm_impl_index",
    "cudnn_batch_norm", "native_group_norm", "batch_norm",
}  # fmt: skip
_LAST_NORMS = {"native_layer_norm", "_fused_rms_norm", "layer_norm"}
_ZEROS = {"zeros", "new_zeros", "zeros_like", "zero_"}
_ONES = {"ones", "new_ones", "ones_like"}
_RESTORING = (CONTRACTIONS - _PRODUCTS - _CONVOLUTIONS) | {"empty", "new_empty", "empty_like"}
_FILLING = {"ones", "full", "rand", "randn", "new_ones", "new_full", "ones_like", "full_like", "rand_like", "randn_like"} | {
    "normal_", "uniform_", "softmax", "_softmax", "log_softmax", "_log_softmax", "_safe_softmax", "fill_",
    "logsumexp", "logcumsumexp",
}  # fmt: skip
_FILLED = _FILLING | _ZEROS
_LAYERS = _CONVOLUTIONS | _CHANNEL_NORMS | _LAST_NORMS
_WRITING = {"index_put", "_index_put_impl", "index_fill", "copy"} | {
    "index_copy", "index_add", "index_reduce", "scatter", "scatter_add", "scatter_reduce",
}  # fmt: skip
_PICKING = PICKS | {"gather", "embedding"}  # by numbers that are no values
# zero times anything, and functions of one number that are zero at zero: not asked, for they are most of all there are
_KEEPING = {"mul", "relu", "gelu", "silu", "tanh", "neg", "leaky_relu"}
VIEWS = {"view", "_unsafe_view", "unsqueeze", "squeeze", "expand", "alias", "detach", "permute", "transpose", "_to_copy"}
"""Operators whose result is their operand, in another shape or type."""
_MOVING = VIEWS | {"clone", "contiguous", "lift_fresh", "lift_fresh_copy", "slice", "select", "t"}
_WHY = "summed where what has left would not be zero ({})"
_DIVIDING = (torch.ops.aten.div, torch.ops.aten.div_)
# what stands in operands of which nothing is known, one after another: the same, more and less than the next
_PROBES = ((0.7,), (-1.3,), (0.7, -1.3, 2.6), (-1.3, 0.7, -2.8))
_MOST = 10_000
_answers: dict[Any, float | None] = {}


class Constant(NamedTuple):
    """A tensor that has a number, known, where a channel has left."""

    value: float
    everywhere: bool
    """At every other position too."""


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
    constant = None
    if name in _FILLED:
        constant = _filled(t, func, name, args, kwargs)
        left = constant is not None and constant.value == 0
    elif name in _RESTORING:
        left = True
    elif name in _PRODUCTS:
        added = len(args) == 3 and kwargs.get("beta") != 0
        left = _product(t, *args[-2:]) and (not added or _sum(t, args[0], outputs[0]))
    elif name in _DISTANCES:
        left = _distances(t, args[0], args[1], outputs[0])
    elif name in _LAYERS:
        left = _layer(t, func, name, args, kwargs, outputs[0])
        if name in _CONVOLUTIONS and t.remains.get(args[1]) is False:
            left = _kernel(t, name, args, outputs[0]) and left
    elif name == "constant_pad_nd":
        left = len(args) < 3 or args[2] == 0
    elif name.rstrip("_") in _WRITING:
        left = _written(t, name.rstrip("_"), named_arguments(func, args, kwargs))
    elif pointwise and name.rstrip("_") in _KEEPING and _is_zeroed(t, args[0]):
        left = True
    elif pointwise:
        constant = _asked(t, func, args, kwargs, outputs[0])
        left = constant is not None and constant.value == 0
    else:
        beside = [x for x in inputs[1:] if any(_may_leave(t, ids) for ids in t.ids(x))] if name in _PICKING else inputs[1:]
        left = not len(t.remains) or not any(one is False for one in t.remains.each([*inputs[:1], *beside]))
        if name in _MOVING:
            constant = _constant(t, inputs[0])
    if name in VIEWS and len(t.sums) and (pending := t.sums.get(inputs[0])) is not None:
        t.sums[outputs[0]] = pending
    for out in outputs:
        if left:
            t.remains.pop(out)
        else:
            t.remains[out] = False
        if constant is not None and constant != _ZERO:
            t.constants[out] = constant
        elif len(t.constants):
            t.constants.pop(out)
    if name.endswith("_") and (base := outputs[0]._base) is not None:  # written through a view
        t.constants.pop(base)
        if not left:
            t.remains[base] = False


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
    """Whether rows and columns that have left are zero in ``a @ b``; locks what it sums where neither is zero there."""
    rows, columns = (t.remains.get(x) is False for x in (a, b))
    left = t.ids(a) if a.dim() > 1 else [None, *t.ids(a)]
    right = t.ids(b) if b.dim() > 1 else [*t.ids(b), None]
    if rows and columns:
        for summed in (left[-1], right[-2]):
            t.space.lock(summed, _WHY.format(t.where))
    batch = any(ids is not None for ids in (*left[:-2], *right[:-2]))
    return not ((rows and left[-2] is not None) or (columns and right[-1] is not None) or (rows and columns and batch))


def _distances(t: TraceState, a: Tensor, b: Tensor, out: Tensor) -> bool:
    """Whether distances between rows are zero where one has left; locks what they sum unless both are zero there."""
    if not all(t.remains.get(x) is None and t.ids(x)[-1] is not None and _stays_apart(t.ids(x)[-1]) for x in (a, b)):
        for x in (a, b):
            t.space.lock(t.ids(x)[-1], _WHY.format(t.where))
    return not any(_may_leave(t, ids) for ids in t.ids(out))


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


def _filled(t: TraceState, func: Any, name: str, args: Any, kwargs: Any) -> Constant | None:
    """The number that a tensor is filled with, where it is one."""
    if name in _ZEROS | _ONES:
        return Constant(float(name in _ONES), everywhere=True)
    given = named_arguments(func, args, kwargs)
    return _number(t, given.get("fill_value", given.get("value")))


def _written(t: TraceState, name: str, given: dict[str, Any]) -> bool:
    """Whether what has left is zero in a tensor, some positions of which are written."""
    written = next((given[key] for key in ("values", "value", "source", "src") if given.get(key) is not None), None)
    number = _number(t, written)
    zeroed = number is not None and number.value == 0
    return zeroed and (name == "copy" or t.remains.get(given["self"]) is None)


def _number(t: TraceState, x: Any) -> Constant | None:
    if isinstance(x, Tensor):
        return _constant(t, x)
    return Constant(float(x), everywhere=True) if isinstance(x, (bool, int, float)) else None


def _constant(t: TraceState, x: Tensor) -> Constant | None:
    """What stands where a channel of a tensor has left, as far as it is known."""
    if (known := t.constants.get(x)) is not None:
        return known
    if t.remains.get(x) is not None:
        return None
    if any(_stays_apart(ids) for ids in t.ids(x)):
        return _ZERO
    if x.dim() == 0 and type(x) is Tensor and x.device.type == "cpu" and not x.is_complex():
        with suppress(RuntimeError):  # inside of ``vmap`` it has many values
            return Constant(float(x.item()), everywhere=True)
    return None


_ZERO = Constant(0.0, everywhere=False)


def _stays_apart(ids: Ids) -> bool:
    """Whether a dimension's positions are its own, rather than one that was broadcast."""
    return ids is not None and bool((ids != FREE).any())


def _is_zeroed(t: TraceState, x: Any) -> bool:
    """Whether a tensor has channels, and those that have left are zero."""
    return isinstance(x, Tensor) and t.remains.get(x) is None and any(_stays_apart(ids) for ids in t.ids(x))


def _asked(t: TraceState, func: Any, args: Any, kwargs: Any, out: Tensor) -> Constant | None:
    """What a pointwise operator gives where a channel has left, whatever stands in operands of which nothing is known."""
    given = (*args, *kwargs.values())
    tensors = [x for x in given if isinstance(x, Tensor)]
    known = {id(x): _constant(t, x) for x in tensors}
    beside = [x for x in tensors if (one := known[id(x)]) is not None and not one.everywhere]
    if any(known[id(x)] != _ZERO for x in beside) and not all(_leaves_with(t, x, out) for x in beside):
        known = {key: one if one is None or one.value == 0 else None for key, one in known.items()}  # another dimension's
    if func.overloadpacket in _DIVIDING and known.get(id(args[1])) == _ZERO and not _leaves_with(t, args[1], out):
        known[id(args[1])] = None  # zero only where a whole row has left, which would be no number
    places = {key: place for place, key in enumerate(key for key, one in known.items() if one is None)}
    kinds = tuple(_operand(x, known[id(x)], places.get(id(x), 0)) if isinstance(x, Tensor) else x for x in given)
    key = func, tuple(kwargs), kinds
    if len(_answers) > _MOST:
        _answers.clear()
    try:
        if key not in _answers:
            _answers[key] = _answer(func, kinds, len(args), tuple(kwargs), bool(places))
    except TypeError:  # lists among the arguments
        return _ZERO
    value = _answers[key]
    return None if value is None else Constant(value, everywhere=bool(tensors) and not beside and not places)


def _leaves_with(t: TraceState, x: Tensor, out: Tensor) -> bool:
    """Whether a tensor has all channels that an operator's result has."""
    own = [None] * (out.dim() - x.dim()) + t.ids(x)
    return all(_stays_apart(a) or not _stays_apart(b) for a, b in zip(own, t.ids(out), strict=True))


class _Operand(NamedTuple):
    """A tensor that an operator is given: one number where a channel has left, or anything."""

    dtype: torch.dtype
    value: float | None
    place: int
    """Which one it is of those that may be anything."""

    def one(self, probe: tuple[float, ...]) -> Tensor:
        """One element of it."""
        number = probe[self.place % len(probe)] if self.value is None else self.value
        return torch.tensor([number > 0 if self.dtype == torch.bool else number], device="cpu").to(self.dtype)


def _operand(x: Tensor, known: Constant | None, place: int) -> _Operand:
    return _Operand(x.dtype, None if known is None else known.value, place)


def _answer(func: Any, kinds: tuple[Any, ...], positional: int, names: tuple[str, ...], unknown: bool) -> float | None:
    """The number that an operator gives, None where it is not zero and may be any."""
    for probe in _PROBES if unknown else _PROBES[:1]:
        try:
            given = [x.one(probe) if isinstance(x, _Operand) else x for x in kinds]
            out = func(*given[:positional], **dict(zip(names, given[positional:], strict=True)))
            first = out[0] if isinstance(out, (tuple, list)) else out
            if not bool(first.any()):
                continue
        except Exception:
            continue  # not to be asked with one element: taken for one that keeps zeros
        drawn = unknown or first.is_complex() or torch.Tag.nondeterministic_seeded in func.tags
        return float(first) if not drawn and isfinite(float(first)) else None
    return 0.0
