"""Numbers that operators compute with beside tensors: factors, exponents, constants; not sizes, dimensions and positions."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from math import nan
from typing import Any

from torch import Tensor

_KINDS = {"Tensor", "number", "float", "Optional[Tensor]", "Optional[number]", "Optional[float]"}
# where positions that are counted end says how many there are, which their shape tells
_COUNTING = {"arange", "range"}
# positions along dimensions that stay, and how many of them are picked: no shape that is predicted tells
_PLACES = {
    "topk": {"k"}, "select": {"index"}, "tril": {"diagonal"}, "triu": {"diagonal"}, "diagonal": {"offset"},
    "slice": {"start", "step"}, "narrow_copy": {"start"}, "unfold": {"size", "step"},
    "slice_scatter": {"start", "step"}, "select_scatter": {"index"}, "diagonal_scatter": {"offset"},
}  # fmt: skip
# their number stays where channels leave evenly, and says what is normalised together
_GROUPS = {"native_group_norm": {"group"}}
# how far things move along dimensions that stay, and what windows over them meet: lists among the arguments, by position
_MOVES = {
    "roll": (1,), "convolution": (3, 4, 5), "constant_pad_nd": (1,), "im2col": (1, 2, 3, 4),
    **{f"{side}ion_pad{n}d": (1,) for side in ("reflect", "replicat") for n in (1, 2, 3)},
    **{name: (1, 2, 3) for name in ("avg_pool1d", "avg_pool2d", "avg_pool3d")},
    **{f"max_pool{n}d_with_indices": (1, 2, 3, 4) for n in (2, 3)},
}  # fmt: skip
_FEW = 64
LIFTED = frozenset({"lift", "lift_fresh", "lift_fresh_copy"})
"""Operators that make a number a tensor."""


@functools.cache
def _places(func: Any) -> tuple[frozenset[int], frozenset[str]]:
    """Where an operator takes numbers: positions and names of its arguments."""
    name = func.overloadpacket.__name__
    whole = _GROUPS.get(name, set()) | _PLACES.get(name, set())
    left_out = "end" if name in _COUNTING else None
    arguments = [(i, a) for i, a in enumerate(func._schema.arguments) if a.name != left_out]
    taking = [(i, a.name) for i, a in arguments if str(a.type) in _KINDS or a.name in whole]
    return frozenset(i for i, _ in taking), frozenset(name for _, name in taking)


def numbers(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[float | complex, ...]:
    """What an ATen operator is given, in order; the values themselves where a few numbers are made a tensor."""
    name = func.overloadpacket.__name__
    if name in LIFTED:
        made: Tensor = args[0]
        return tuple(made.flatten().tolist()) if made.numel() <= _FEW and made.device.type == "cpu" else ()
    if name == "as_strided":
        return _strides(*args, **kwargs)
    if name in _MOVES:
        return tuple(n for place in _MOVES[name] for n in (*args, *[()] * place)[place])
    plain = [(i, x) for i, x in enumerate(args) if type(x) in (int, float, complex)]
    named = [(key, x) for key, x in kwargs.items() if type(x) in (int, float, complex)]
    if not plain and not named:
        return ()
    positions, names = _places(func)
    return (*(x for i, x in plain if i in positions), *(x for key, x in named if key in names))


def _strides(x: Tensor, size: Sequence[int], stride: Sequence[int], storage_offset: int | None = None) -> tuple[float, ...]:
    """Where a view begins and how far it steps: beside the steps of the tensor's own dimensions, if it has as many."""
    own = [step or 1 for step in x.stride()] if x.dim() == len(size) else [1] * len(size)
    steps = (step / one if n > 1 else nan for n, step, one in zip(size, stride, own, strict=True))
    return (0 if storage_offset is None else storage_offset - int(x.storage_offset()), *steps)


def heard(given: tuple[float | complex, ...], before: tuple[float | complex, ...]) -> tuple[float | complex, ...]:
    """What is given now, with the step along a dimension of one position, which may be any, as it was before."""
    if len(given) != len(before):
        return given
    return tuple(then if now != now else now for now, then in zip(given, before, strict=True))
