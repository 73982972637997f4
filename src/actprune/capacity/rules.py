"""Lipschitz constants of ATen operators in each of their arguments, in the Euclidean norm of whole tensors.

A rule gets the operator's bound arguments and its output and returns (argument, constant) pairs. Operators without a rule, and
those that have no constant (a product of two activations, a norm whose statistics come from its input), are refused by name.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from types import SimpleNamespace
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.nn import functional as F

Pairs: TypeAlias = "list[tuple[Tensor, float]]"
Rule: TypeAlias = Callable[[SimpleNamespace, Tensor], Pairs]

RULES: dict[str, Rule] = {}
JOINED = {"cat", "stack"}
"""Operators whose arguments take places of their own in the output: their constants add up in squares."""

_ONE = (
    "relu", "hardtanh", "clamp", "clamp_min", "clamp_max", "tanh", "abs", "neg", "sin", "cos", "alias", "detach", "clone",
    "contiguous", "_to_copy", "view", "_unsafe_view", "reshape", "flatten", "permute", "transpose", "t", "squeeze", "unsqueeze",
    "slice", "select", "narrow", "split", "split_with_sizes", "chunk", "unbind", "flip", "roll", "pixel_shuffle",
    "channel_shuffle", "native_dropout", "lift_fresh", "unsafe_chunk", "unsafe_split",
)  # fmt: skip
"""Contractions, and what only moves or drops elements."""

# suprema of the derivatives; GELU's and SiLU's are attained at sqrt(2) and 2.3994
_SLOPES = {
    "sigmoid": 0.25, "hardsigmoid": 1 / 6, "gelu": 1.1290, "silu": 1.0999, "hardswish": 1.5, "mish": 1.0885, "softplus": 1.0,
}  # fmt: skip


def rule(*names: str) -> Callable[[Rule], Rule]:
    """Register the rule of operators."""

    def register(function: Rule) -> Rule:
        for name in names:
            assert name not in RULES, name
            RULES[name] = function
        return function

    return register


def factor_of(windows: Sequence[tuple[int, int, int]]) -> int:
    """Most windows that one position lies in, from (window, stride, dilation) per dimension."""
    return math.prod(_overlap(*window) for window in windows)


def _overlap(window: int, stride: int, dilation: int) -> int:
    """Taps at offsets j * dilation of windows that start every ``stride``: the fullest residue class."""
    taps = [j * dilation % stride for j in range(window)]
    return max(taps.count(rest) for rest in taps)


@rule(*_ONE)
def _same(a: SimpleNamespace, out: Tensor) -> Pairs:
    return [(a.input, 1.0)]


@rule(*_SLOPES)
def _slope(a: SimpleNamespace, out: Tensor) -> Pairs:
    return [(a.input, _SLOPES[a.name])]


@rule("leaky_relu", "elu", "prelu", "_prelu_kernel")
def _two_slopes(a: SimpleNamespace, out: Tensor) -> Pairs:
    if a.name == "elu":  # scale * (x, or alpha (exp(input_scale x) - 1))
        return [(a.input, abs(a.scale) * max(1.0, abs(a.alpha * a.input_scale)))]
    slope = a.negative_slope if a.name == "leaky_relu" else float(a.weight.detach().abs().max())
    return [(a.input, max(1.0, abs(slope)))]


@rule("add", "sub", "rsub")
def _sum(a: SimpleNamespace, out: Tensor) -> Pairs:
    alpha = abs(float(getattr(a, "alpha", 1)))
    first, second = (alpha, 1.0) if a.name == "rsub" else (1.0, alpha)
    return [(x, c * _repeats(x, out)) for x, c in ((a.input, first), (a.other, second)) if isinstance(x, Tensor)]


@rule("mul", "div")
def _product(a: SimpleNamespace, out: Tensor) -> Pairs:
    if a.name == "div":
        if a.is_live(a.other):
            raise Unbounded("divides by an activation")
        return [(a.input, _largest(1 / _tensor(a.other)) * _repeats(a.input, out))]
    live = [x for x in (a.input, a.other) if a.is_live(x)]
    if len(live) > 1:
        raise Unbounded("multiplies two activations")
    return [(x, _largest(a.other if x is a.input else a.input) * _repeats(x, out)) for x in live]


@rule("cat", "stack")
def _joined(a: SimpleNamespace, out: Tensor) -> Pairs:
    return [(x, 1.0) for x in a.tensors]


@rule("expand", "repeat")
def _repeated(a: SimpleNamespace, out: Tensor) -> Pairs:
    return [(a.input, _repeats(a.input, out))]


@rule("mean")
def _mean(a: SimpleNamespace, out: Tensor) -> Pairs:
    return [(a.input, math.sqrt(out.numel() / a.input.numel()))]


@rule("sum")
def _total(a: SimpleNamespace, out: Tensor) -> Pairs:
    return [(a.input, math.sqrt(a.input.numel() / out.numel()))]


@rule("amax", "amin")
def _extreme(a: SimpleNamespace, out: Tensor) -> Pairs:
    return [(a.input, 1.0)]


@rule("max_pool2d", "max_pool1d", "max_pool3d", "max_pool2d_with_indices", "max_pool3d_with_indices")
def _max_pool(a: SimpleNamespace, out: Tensor) -> Pairs:
    """One position may be the maximum of every window that it lies in."""
    rank = len(a.kernel_size)
    return [(a.input, math.sqrt(factor_of(_windows(a, rank))))]


@rule("avg_pool1d", "avg_pool2d", "avg_pool3d")
def _avg_pool(a: SimpleNamespace, out: Tensor) -> Pairs:
    """Per dimension ||A||^2 <= largest row sum (1) times largest column sum; the pool is the product of its dimensions."""
    rank = len(a.kernel_size)
    kernel, stride = _per_dim(a.kernel_size, rank), _per_dim(a.stride or a.kernel_size, rank)
    product = 1.0
    for d, (k, step, padding) in enumerate(zip(kernel, stride, _per_dim(a.padding, rank), strict=True), -rank):
        starts = [i * step - padding for i in range(out.shape[d])]
        end = a.input.shape[d]
        spans = [range(max(start, 0), min(start + k, end)) for start in starts]
        whole = [min(start + k, end + padding) - start for start in starts]
        divisors = whole if a.count_include_pad else [len(span) for span in spans]
        product *= _column(end, zip(spans, divisors, strict=True))
    override = getattr(a, "divisor_override", None)
    return [(a.input, math.sqrt(product) * (math.prod(kernel) / override if override else 1.0))]


@rule("_adaptive_avg_pool2d", "_adaptive_avg_pool3d", "adaptive_avg_pool1d", "adaptive_avg_pool2d")
def _adaptive_avg_pool(a: SimpleNamespace, out: Tensor) -> Pairs:
    """As for pools of one size."""
    rank = 3 if a.name.endswith("3d") else 1 if a.name.endswith("1d") else 2
    product = 1.0
    for n, m in zip(a.input.shape[-rank:], out.shape[-rank:], strict=True):
        spans = [range(i * n // m, -(-(i + 1) * n // m)) for i in range(m)]
        product *= _column(n, [(span, len(span)) for span in spans])
    return [(a.input, math.sqrt(product))]


def _column(n: int, windows: Iterable[tuple[range, int]]) -> float:
    """Largest total weight of one of n positions, from every window's positions and what it divides by."""
    weights = [0.0] * n
    for span, divisor in windows:
        for j in span:
            weights[j] += 1 / divisor
    return max(weights)


@rule("adaptive_max_pool2d", "adaptive_max_pool3d")
def _adaptive_max_pool(a: SimpleNamespace, out: Tensor) -> Pairs:
    rank = 3 if a.name.endswith("3d") else 2
    counts = 1
    for n, m in zip(a.input.shape[-rank:], out.shape[-rank:], strict=True):
        counts *= max(sum(i * n // m <= j < -(-(i + 1) * n // m) for i in range(m)) for j in range(n))
    return [(a.input, math.sqrt(counts))]


@rule("constant_pad_nd", "pad")
def _padded(a: SimpleNamespace, out: Tensor) -> Pairs:
    return [(a.input, 1.0)]


@rule("upsample_nearest1d", "upsample_nearest2d", "upsample_nearest3d")
def _nearest(a: SimpleNamespace, out: Tensor) -> Pairs:
    sizes = zip(a.input.shape[2:], out.shape[2:], strict=True)
    return [(a.input, math.sqrt(math.prod(-(-m // n) for n, m in sizes)))]


class Unbounded(Exception):  # noqa: N818
    """The operator has no Lipschitz constant; says why."""


def _windows(a: SimpleNamespace, rank: int) -> list[tuple[int, int, int]]:
    stride = a.stride or a.kernel_size
    dilation = getattr(a, "dilation", 1)
    return list(zip(*(_per_dim(x, rank) for x in (a.kernel_size, stride, dilation)), strict=True))


def _per_dim(value: Any, rank: int) -> list[int]:
    values = [value] if isinstance(value, int) else list(value)
    return values * rank if len(values) == 1 else values


def _repeats(x: Tensor, out: Tensor) -> float:
    """The constant of broadcasting x into the output's shape."""
    return math.sqrt(out.numel() / max(x.numel(), 1))


def _largest(value: Any) -> float:
    return float(_tensor(value).detach().abs().max())


def _tensor(value: Any) -> Tensor:
    """A number or a list as a tensor; a tensor where it is."""
    return value if isinstance(value, Tensor) else torch.tensor(value, device="cpu")


def reflected(a: SimpleNamespace, out: Tensor) -> Pairs:
    """Reflecting and replicating padding: the square root of how often the most used position appears."""
    index = torch.arange(a.input[0, 0].numel(), dtype=torch.float64, device="cpu").reshape(1, 1, *a.input.shape[2:])
    mode = "reflect" if "reflection" in a.name else "replicate"
    copies = F.pad(index, list(a.padding), mode=mode).flatten().long()
    return [(a.input, math.sqrt(int(copies.bincount().max())))]


for _rank in (1, 2, 3):
    rule(f"reflection_pad{_rank}d", f"replication_pad{_rank}d")(reflected)
