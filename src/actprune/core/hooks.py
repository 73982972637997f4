"""Watch, or replace, what modules read, with hooks that live only inside a ``with`` block."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch._decomp import decomposition_table
from torch.nn.utils.rnn import PackedSequence
from torch.utils._python_dispatch import TorchDispatchMode

from actprune.core.switches import EAGER, EVERY_MODULE

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

Watcher = Callable[[Tensor], Tensor | None]
"""Takes what is read; what it returns, unless None, is read in its place."""


@contextmanager
def uncompiled() -> Iterator[None]:
    """What is compiled runs eagerly inside the block, around a model too, and so does what PyTorch runs as one kernel.

    Otherwise hooks of what it holds would not fire, and forwards would not be called.
    """
    with EAGER.turned(), EVERY_MODULE.turned():
        yield


class Live:
    """A hook of one module: copied or pickled with it, it does nothing, for what a copy runs is not what is watched."""

    __slots__ = ("_hook",)

    def __init__(self, hook: Callable[..., Any]) -> None:
        self._hook = hook

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the hook."""
        return self._hook(*args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Live:
        return Live(_not_heard)

    def __reduce__(self) -> Any:
        return Live, (_not_heard,)


@contextmanager
def watch_inputs(model: nn.Module, watchers: Mapping[str, Watcher]) -> Iterator[None]:
    """Call ``watchers[path](x)`` with the first argument of every forward of the module at ``path``; packed, with its rows."""
    with ExitStack() as stack:
        for path, watcher in watchers.items():

            def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], watcher: Watcher = watcher) -> Any:
                read = args[0] if args else kwargs["input"]
                packed = isinstance(read, PackedSequence)
                other = watcher(read.data if packed else read)
                if other is None:
                    return None
                other = read._replace(data=other) if packed else other
                return ((other, *args[1:]), kwargs) if args else (args, {**kwargs, "input": other})

            handle = model.get_submodule(path).register_forward_pre_hook(Live(hook), with_kwargs=True)
            stack.callback(handle.remove)
        yield


class Ear:
    """Stands in for a module's forward and hears what it is given; copied or pickled with a module, it is the plain forward."""

    __slots__ = ("_before", "_forward", "watcher")

    def __init__(self, module: nn.Module, watcher: Callable[[Tensor], object]) -> None:
        self._forward, self.watcher = module.forward, watcher
        self._before = vars(module).get("forward")
        module.forward = self  # type: ignore[method-assign]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the module's forward once the watcher has seen the first argument."""
        self.watcher(args[0] if args else kwargs["input"])
        return self._forward(*args, **kwargs)

    def remove(self, module: nn.Module) -> None:
        """Hear nothing more, and leave what others put in the forward's place since: they may go in another order."""
        self.watcher = _not_heard
        outer = vars(module).get("forward")
        while isinstance(outer, Ear) and outer is not self and outer._forward is not self:
            outer = outer._forward
        if outer is self:
            put_back(module, "forward", self._before)
        elif isinstance(outer, Ear):
            outer._forward, outer._before = self._forward, self._before

    @property
    def __wrapped__(self) -> Callable[..., Any]:
        return self._forward

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return copy.deepcopy(self._forward, memo)

    def __reduce__(self) -> Any:
        return _itself, (self._forward,)


class _Around:
    """Stands in for a method and runs it inside a context; copied or pickled, it is the plain method."""

    def __init__(self, method: Callable[..., Any], context: Callable[[], AbstractContextManager[Any]]) -> None:
        self._method, self._context = method, context
        # who asks for the arguments looks through one wrapper, which may be there already
        self.__wrapped__ = getattr(method, "__wrapped__", method)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with self._context():
            return self._method(*args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return copy.deepcopy(self._method, memo)

    def __reduce__(self) -> Any:
        return _itself, (self._method,)


@contextmanager
def around(module: nn.Module, name: str, context: Callable[[], AbstractContextManager[Any]]) -> Iterator[None]:
    """Inside the block the module's method of that name runs inside the context each time."""
    before, method = vars(module).get(name), getattr(module, name)
    object.__setattr__(module, name, _Around(method, context))
    try:
        yield
    finally:
        put_back(module, name, before)


def put_back(module: nn.Module, name: str, value: Any) -> None:
    """Give an attribute of the instance its value again, or the class's own where the instance had none."""
    if value is None:
        vars(module).pop(name, None)
    else:
        object.__setattr__(module, name, value)


def _itself(forward: Any) -> Any:
    return forward


def _not_heard(*_: Any) -> None:
    pass


@contextmanager
def listening(model: nn.Module, watchers: Mapping[str, Callable[[Tensor], object]]) -> Iterator[dict[str, Ear]]:
    """Call ``watchers[path](x)`` with the first argument of every forward of the module at ``path``, packed sequences included.

    A hook per module would take longer than a small layer on a GPU. ``ear.watcher`` may be changed inside the block.
    """
    ears = {}
    with ExitStack() as stack:
        for path, watcher in watchers.items():
            module = model.get_submodule(path)
            ears[path] = ear = Ear(module, watcher)
            stack.callback(ear.remove, module)
        yield ears


def joined(watchers: list[Watcher], may_be_packed: bool) -> Callable[[Any], object]:
    """All watchers of one module as one; what may be a packed sequence is handed to them as its rows."""
    if len(watchers) == 1 and not may_be_packed:
        return watchers[0]

    def watch(x: Tensor | PackedSequence) -> None:
        for watcher in watchers:
            watcher(x.data if isinstance(x, PackedSequence) else x)

    return watch


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

    def __init__(self, watchers: Mapping[tuple[int, int], list[Watcher]]) -> None:
        super().__init__()
        self.watchers = watchers
        self.ordinal = 0
        self.paused = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # noqa: D102
        name = func.overloadpacket.__name__
        if name not in CONTRACTIONS:
            if _is_fused(func) and not self._wants(_IN_ATTENTION):
                self.ordinal += 0 if self.paused else _IN_ATTENTION
                return func(*args, **(kwargs or {}))
            return decomposed(self, func, args, kwargs or {})
        if not self.paused:
            for operand in (0, 1):
                for watcher in self.watchers.get((self.ordinal, operand), ()):
                    place = OPERANDS.get(name, 0) + operand
                    other = watcher(args[place])
                    args = args if other is None else (*args[:place], other, *args[place + 1 :])
            self.ordinal += 1
        return func(*args, **(kwargs or {}))

    def _wants(self, n: int) -> bool:
        """Whether anybody watches one of the next contractions."""
        return not self.paused and any(self.watchers.get((self.ordinal + k, operand)) for k in range(n) for operand in (0, 1))


@contextmanager
def watch_operands(model: nn.Module, watchers: Mapping[str, Mapping[tuple[int, int], list[Watcher]]]) -> Iterator[None]:
    """Watch operands of contractions that a module runs outside its children.

    Args:
        model: the model.
        watchers: module path -> (which contraction, 0 for its first factor or 1 for its second) -> watchers.

    Fused attention counts as the two products that it was when the model was traced, and is taken apart only where one of
    them is watched.
    """
    if not watchers:
        yield
        return
    wanted = {id(model.get_submodule(path)): of_module for path, of_module in watchers.items()}
    running: list[Operands] = []
    with ExitStack() as stack:
        stack.enter_context(EVERY_MODULE.turned())
        for module in model.modules():  # whichever runs inside another counts for itself, also out of a list
            if isinstance(module, torch.jit.ScriptModule):  # takes no hooks; what it runs counts as its caller's own
                continue
            _watch_module(module, wanted.get(id(module)), running, stack)
        yield


def _watch_module(
    module: nn.Module,
    wanted: Mapping[tuple[int, int], list[Watcher]] | None,
    running: list[Operands],
    stack: ExitStack,
) -> None:
    entered: list[Operands | None] = []

    def enter(*_: Any) -> None:
        entered.append(running[-1] if running else None)
        if running:
            running[-1].paused += 1
        if wanted is not None:
            running.append(Operands(wanted))
            running[-1].__enter__()

    def leave(*_: Any) -> None:
        if not entered:
            return
        if wanted is not None:
            running.pop().__exit__(None, None, None)
        if (around := entered.pop()) is not None:
            around.paused -= 1

    # before other hooks, which may run contractions of their own: so the trace numbered them (a spectral norm, for one)
    stack.callback(module.register_forward_pre_hook(Live(enter), prepend=True).remove)
    stack.callback(module.register_forward_hook(Live(leave), always_call=True).remove)
