"""Watch, or replace, operands of the contractions that a module's forward runs itself, operator by operator."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch._decomp import decomposition_table
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode

from actprune.core.followers import following
from actprune.core.hooks import Watcher

CONTRACTIONS = frozenset({
    "convolution", "mm", "bmm", "addmm", "baddbmm", "_sparse_addmm", "mv", "dot", "vdot", "_grouped_mm", "deform_conv2d",
})  # fmt: skip
"""Operators that count as one contraction each, in the order in which a module runs them."""
_IN_ATTENTION = 2
"""Contractions of fused attention: queries with keys, and what comes of it with values."""

OPERANDS = {"addmm": 1, "baddbmm": 1, "_sparse_addmm": 1}
"""Where an operator's first factor stands among its arguments."""

IN_PARTS = frozenset({
    "mse_loss", "smooth_l1_loss", "huber_loss", "soft_margin_loss", "binary_cross_entropy", "binary_cross_entropy_with_logits",
    "dist", "nansum", "count_nonzero", "aminmax",
})  # fmt: skip
"""Operators that compute every position by itself and reduce: what PyTorch's own decompositions run is looked at instead."""


@dataclass(frozen=True)
class InCall:
    """A contraction of one call of a module whose calls run different ones."""

    number: int
    """How many contractions the call runs before it."""
    call: int
    """Which call of the module in a forward of the model."""
    n_calls: int
    """How many there are in one."""


Ordinal: TypeAlias = int | InCall
"""Which of the contractions that a module's forward runs outside its children; a number is that in every call."""
Watchers: TypeAlias = Mapping[tuple[Ordinal, int], list[Watcher]]
"""Which contraction, 0 for its first factor or 1 for its second -> who hears it."""
OfCall: TypeAlias = Mapping[tuple[int, int], list[Watcher]]
"""The same of one call."""


def by_call(watchers: Watchers) -> list[OfCall]:
    """The watchers of one module: of all calls, or where these differ of each, and then of those that nobody knows."""
    n_calls = max((which.n_calls for which, _ in watchers if isinstance(which, InCall)), default=0)
    found: list[dict[tuple[int, int], list[Watcher]]] = [{} for _ in range(n_calls + 1)]
    for (which, operand), heard in watchers.items():
        number, call = (which.number, which.call) if isinstance(which, InCall) else (which, 0)
        found[call][number, operand] = heard
    return list(found)


def named_arguments(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a call by the names of the operator's schema, defaults filled in."""
    named = {}
    for position, argument in enumerate(func._schema.arguments):
        given = position < len(args) and not argument.kwarg_only
        named[argument.name] = args[position] if given else kwargs.get(argument.name, argument.default_value)
    return named


@functools.cache  # asked with every operator
def is_composite(func: Any) -> bool:
    """Whether an operator's parts are looked at in its place: composite ones, losses and fused attention."""
    composite = bool(torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd"))
    return composite or _is_fused(func) or _parts(func) is not None


@functools.cache
def _parts(func: Any) -> Callable[..., Any] | None:
    return decomposition_table.get(func) if func.overloadpacket.__name__ in IN_PARTS else None


@functools.cache
def _is_fused(func: Any) -> bool:
    return func.overloadpacket.__name__.startswith("_scaled_dot_product_") and "_math" not in func.overloadpacket.__name__


def _attention(mode: TorchDispatchMode, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Fused attention as matrix products, laid out as the kernel's own result."""
    given = named_arguments(func, args, kwargs)
    query, key = given["query"], given["key"]
    mask = given.get("attn_mask", given.get("attn_bias"))
    dropout, causal = given.get("dropout_p", 0.0), given.get("is_causal", False)
    grouped = query.dim() > 3 and query.shape[-3] != key.shape[-3]
    out = func(*args, **kwargs)
    with mode:
        heads, _ = torch.ops.aten._scaled_dot_product_attention_math.default.decompose(
            query, key, given["value"], mask, dropout, causal, scale=given.get("scale"), enable_gqa=grouped
        )
        order = sorted(range(heads.dim()), key=out[0].stride, reverse=True)
        heads = heads.permute(order).contiguous().permute([order.index(d) for d in range(heads.dim())])
    return heads, *out[1:]


def decomposed(mode: TorchDispatchMode, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run an operator, in its parts where it has some (inference mode hands over composite ones whole)."""
    if _is_fused(func):
        return _attention(mode, func, args, kwargs)
    if (parts := _parts(func)) is not None:
        with mode:
            return parts(*args, **kwargs)
    if is_composite(func):
        with mode:
            out = func.decompose(*args, **kwargs)
        if out is not NotImplemented:
            return out
    return func(*args, **kwargs)


class Operands(TorchDispatchMode):
    """Inside one module's forward: hands over an operand of the k-th contraction it runs itself."""

    def __init__(self, watchers: OfCall) -> None:
        super().__init__()
        self.watchers = watchers
        self.ordinal = 0
        self._suspended = 0
        self._is_out = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # noqa: D102
        name = func.overloadpacket.__name__
        if name not in CONTRACTIONS:
            if _is_fused(func) and not self._wants(_IN_ATTENTION):
                self.ordinal += 0 if self._suspended else _IN_ATTENTION
                return func(*args, **(kwargs or {}))
            return decomposed(self, func, args, kwargs or {})
        if not self._suspended:
            for operand in (0, 1):
                for watcher in self.watchers.get((self.ordinal, operand), ()):
                    place = OPERANDS.get(name, 0) + operand
                    other = watcher(self.read(args[place], operand))
                    args = args if other is None else (*args[:place], other, *args[place + 1 :])
            self.ordinal += 1
        return func(*args, **(kwargs or {}))

    def read(self, x: Tensor, operand: int) -> Tensor:
        """What a watcher is handed for the operand x of the contraction that comes next."""
        return x

    def _wants(self, n: int) -> bool:
        """Whether anybody watches one of the next contractions."""
        return not self._suspended and any(
            self.watchers.get((self.ordinal + k, operand)) for k in range(n) for operand in (0, 1)
        )

    def suspend(self) -> None:
        """What runs from here on belongs to another module; operators there do not come by unless a mode is on top."""
        self._suspended += 1
        if self._suspended == 1 and _get_current_dispatch_mode() is self:
            self.__exit__(None, None, None)
            self._is_out = True

    def resume(self) -> None:
        """The other module is done."""
        self._suspended -= 1
        if not self._suspended and self._is_out:
            self.__enter__()
            self._is_out = False

    def abandon(self) -> None:
        """The forward was broken off, and no hook was told."""
        if _get_current_dispatch_mode() is self:
            self.__exit__(KeyboardInterrupt, None, None)


@contextmanager
def watch_operands(model: nn.Module, watchers: Mapping[str, Watchers]) -> Iterator[None]:
    """Watch operands of contractions that a module runs outside its children.

    Args:
        model: the model.
        watchers: module path -> which contraction and factor -> watchers.

    Fused attention counts as the two products that it was when the model was traced, and is taken apart only where one of
    them is watched.
    """
    starts = {path: [partial(Operands, of_call) for of_call in by_call(of_module)] for path, of_module in watchers.items()}
    with following(model, starts):
        yield
