"""Numbers that operators compute with beside tensors: factors, exponents, constants; not sizes, dimensions and positions."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

_KINDS = {"Tensor", "number", "float", "Optional[Tensor]", "Optional[number]", "Optional[float]"}
# where positions that are counted end says how many there are, which their shape tells
_COUNTING = {"arange", "range"}
# positions along dimensions that stay, and how many of them are picked: no shape that is predicted tells
_PLACES = {"topk": "k", "select": "index", "tril": "diagonal", "triu": "diagonal", "diagonal": "offset"}
# their number stays where channels leave evenly, and says what is normalised together
_GROUPS = {"native_group_norm": "group"}
# how far things move along dimensions that stay: lists among the arguments, by position
_MOVES = {"roll": (1,), "convolution": (3, 4, 5)}
_LIFTED = {"lift", "lift_fresh", "lift_fresh_copy"}


@functools.cache
def _places(func: Any) -> tuple[frozenset[int], frozenset[str]]:
    """Where an operator takes numbers: positions and names of its arguments."""
    name = func.overloadpacket.__name__
    whole = {_GROUPS.get(name), _PLACES.get(name)}
    left_out = "end" if name in _COUNTING else None
    arguments = [(i, a) for i, a in enumerate(func._schema.arguments) if a.name != left_out]
    taking = [(i, a.name) for i, a in arguments if str(a.type) in _KINDS or a.name in whole]
    return frozenset(i for i, _ in taking), frozenset(name for _, name in taking)


def numbers(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[float | complex, ...]:
    """What an ATen operator is given, in order; the value itself where a number is made a tensor (``torch.tensor(3)``)."""
    name = func.overloadpacket.__name__
    if name in _LIFTED:
        made: Tensor = args[0]
        return (made.item(),) if made.numel() == 1 and made.device.type == "cpu" else ()
    if name in _MOVES:
        return tuple(n for place in _MOVES[name] for n in args[place])
    plain = [(i, x) for i, x in enumerate(args) if type(x) in (int, float, complex)]
    named = [(key, x) for key, x in kwargs.items() if type(x) in (int, float, complex)]
    if not plain and not named:
        return ()
    positions, names = _places(func)
    return (*(x for i, x in plain if i in positions), *(x for key, x in named if key in names))
