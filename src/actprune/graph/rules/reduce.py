"""Reductions: a reduced dimension goes; over units they act, like a norm, on what stays."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from actprune.graph import remains
from actprune.graph.rules.registry import rule
from actprune.graph.state import TraceState


def _dims(a: SimpleNamespace) -> set[int]:
    rank = a.input.dim()
    dims = getattr(a, "dim", None)
    if dims is None or (isinstance(dims, (list, tuple)) and not dims):
        return set(range(rank))
    return {d % rank for d in ([dims] if isinstance(dims, int) else dims)} if rank else set()


@rule(
    "mean",
    "sum",
    "prod",
    "amax",
    "amin",
    "max",
    "min",
    "std",
    "var",
    "std_mean",
    "var_mean",
    "linalg_vector_norm",
    "norm",
    "logsumexp",
    "any",
    "all",
    "_is_all_true",
    "_is_any_true",
)
def reduction(t: TraceState, a: SimpleNamespace, out: Any) -> None:
    """Mean, sum, extremes, variance and norms; where an extreme stands is a position, which locks once somebody reads it."""
    outputs = [x for x in (out if isinstance(out, (tuple, list)) else (out,)) if isinstance(x, Tensor)]
    x, gone = list(t.ids(a.input)), _dims(a)
    extreme = len(gone) == 1 and t.where.startswith(("max ", "amax ", "min ", "amin "))
    if extreme and any(x[d] is guess for d in gone for guess, _ in t.guesses):
        t.scored.add(t.frames[-1].path)  # of the pieces of every channel: maxout
    kept = outputs[0].dim() == a.input.dim()
    ids = [None if d in gone else dim for d, dim in enumerate(x) if kept or d not in gone]
    for tensor in outputs:
        t.set(tensor, ids)
    name = t.where.partition(" ")[0]
    remains.reduced(t, name, a.input, gone, outputs[0])
    if name.startswith(("std", "var")):
        _unbiased(t, a, gone)
    if len(outputs) == 2 and outputs[1].dtype == torch.int64:
        for d in gone:
            t.lock_once_read(outputs[1], x[d], "position of an extreme")


def _unbiased(t: TraceState, a: SimpleNamespace, gone: set[int]) -> None:
    """An unbiased variance of one value is not a number: of what it is taken over, one alone may not stay."""
    unbiased = getattr(a, "unbiased", None)
    less = getattr(a, "correction", 1) if unbiased is None else int(unbiased)
    less = 1 if less is None else int(less)
    over = [ids for d in gone if (ids := t.ids(a.input)[d]) is not None]
    if len(over) == 1 and less < len(over[0]) == math.prod(a.input.shape[d] for d in gone):
        t.unequal += [(t.frames[-1].path, over[0], n) for n in range(1, less + 1)]


@rule("argmax", "argmin", "topk", "sort", "cumsum", "cumprod", "logcumsumexp")
def ordered(t: TraceState, a: SimpleNamespace, out: Any) -> None:
    """Results that name or depend on positions lock the dimension."""
    outputs = out if isinstance(out, (tuple, list)) else (out,)
    x, dims = t.ids(a.input), _dims(a)
    for d in dims:
        t.lock(x[d], "ordered along this dimension")
    for tensor in outputs:
        same = tensor.dim() == a.input.dim()
        t.set(tensor, [None if d in dims else ids for d, ids in enumerate(x) if same or d not in dims])
