"""Run a model once and give every dimension of every tensor its channel ids.

A ``TorchDispatchMode`` sees each ATen operator below autograd; ``rules/`` says what the operator does to ids. Refuse by
default: an operator without a rule locks what it touches and is named in the graph's report.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch._ops import HigherOrderOperator
from torch.utils._python_dispatch import TorchDispatchMode

from actprune.core.calling import Example, call, once_and_twice, undisturbed
from actprune.core.copied import NONE, Copies, is_copied, led_by, named_alike
from actprune.core.errors import ActPruneError, TraceError
from actprune.core.numbers import numbers
from actprune.core.operands import decomposed, is_composite
from actprune.core.stack import module_stack
from actprune.core.switches import GARBAGE
from actprune.core.values import Listing, as_fill, deciding, opaque
from actprune.graph import remains
from actprune.graph.compared import Comparisons
from actprune.graph.records import Binding
from actprune.graph.rules import RULES, bind, pointwise
from actprune.graph.rules.norm import batch_norm
from actprune.graph.splits import Hints, settled
from actprune.graph.state import TraceState
from actprune.graph.told import Reads
from actprune.graph.twins import follow_twins
from actprune.graph.whole import Wholes, wanted

# operators whose outputs are fixed constants: they need no ids and lock nothing
_CONSTANTS = {
    "arange", "scalar_tensor", "randint", "linspace", "eye", "_local_scalar_dense", "is_same_size", "sym_size",
    "tril_indices", "triu_indices", "randperm", "bartlett_window", "hann_window", "_assert_async", "_assert_scalar",
    "_assert_tensor_metadata", "lift", "is_nonzero",
}  # fmt: skip

# constants of a size that the code may have read off a tensor or an attribute: each position gets an id of its own, and a
# rehearsed cut tells whether the size follows
_FILLED = {
    "zeros", "ones", "full", "empty", "rand", "randn", "new_zeros", "new_ones", "new_full", "new_empty",
    "new_empty_strided", "empty_strided",
}  # fmt: skip

# what takes a tensor's shape and leaves its values unread
_SHAPES_ALONE = {"zeros_like", "ones_like", "empty_like", "full_like", "rand_like", "randn_like"} | {
    name for name in _FILLED if name.startswith("new_")
}


def _normalises_nothing(t: TraceState) -> SimpleNamespace | None:
    """Input and tensors of the running batch norm if there is no sample: PyTorch then multiplies by ``weight[0]`` instead."""
    frame = t.frames[-1]
    module = t.modules.get(frame.path)
    x = frame.args[0] if frame.args else None
    if not isinstance(module, nn.modules.batchnorm._NormBase) or not isinstance(x, Tensor) or x.numel():
        return None
    tensors = {name: getattr(module, name) for name in ("weight", "bias", "running_mean", "running_var")}
    return SimpleNamespace(input=x, **tensors)


class ChannelTracer(TorchDispatchMode):
    """Applies the rule of every operator to a trace state."""

    supports_higher_order_operators = True  # to say what is wrong with them

    def __init__(self, state: TraceState) -> None:
        super().__init__()
        self.state = state
        self._inside = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # noqa: D102
        if isinstance(func, HigherOrderOperator):
            raise TraceError(
                f"{func.name()} runs functions that it is given, whose operators cannot be followed; while the model is "
                "pruned, use plain operators: F.scaled_dot_product_attention for flex_attention, torch.where for torch.cond"
            )
        func, args, kwargs = as_fill(func, args, kwargs or {})
        name = func.overloadpacket.__name__
        composite = is_composite(func)
        before = args[0].detach() if name in ("squeeze_", "as_strided_") else None  # whose layout nothing tells afterwards
        t = self.state
        t.reads.add(t, [] if composite else deciding(func, args))  # before it writes
        out = decomposed(self, func, args, kwargs)
        if composite and name not in RULES:
            return out
        if self._inside:
            if not composite and not t.training:
                t.skips(None)
                self._number(name, [], numbers(func, args, kwargs))
            return out
        inputs, outputs = _listed((*args, *kwargs.values())), _listed((out,))
        given = numbers(func, args, kwargs)
        self._read(name, inputs, given)
        function = RULES.get(name)
        if function is None and name.endswith("_") and not name.endswith("__"):
            function = RULES.get(name[:-1])
        if (empty := _normalises_nothing(t)) is not None:
            if outputs and outputs[0].shape == empty.input.shape:
                batch_norm(t, empty, outputs)
        elif function is not None:
            bound = bind(func, args, kwargs)
            if before is not None:
                bound.before = before
            function(t, bound if name.startswith(("squeeze", "unsqueeze")) else _positive(bound), out)
        elif pointwise.is_pointwise(func, name):
            pointwise.pointwise(t, inputs, outputs)
        elif name in _FILLED:
            # outside the model's forward a constant is an input
            inside = len(t.frames) > 1
            filled = [t.space.fresh(n) if n > 1 and inside else None for n in out.shape]
            t.set(out, filled)
            for ids in filled:
                if ids is not None:
                    t.may_count(ids)
                    t.filled[id(ids)] = ids
        elif name not in _CONSTANTS:
            self._refuse(func, inputs)
        remains.follow(t, func, name, args, kwargs, inputs, outputs, pointwise.is_pointwise(func, name))
        t.compute(name, inputs, outputs)
        if not composite and not t.training:
            self._number(name, outputs, given)
        t.reads.add(t, outputs if opaque(func) else [], results=True)
        return out

    def whole(self, function: Any, args: Any, inputs: list[Tensor], follow: Callable[[Any], None]) -> Any:
        """Run a call whose operators are not looked at one by one; ``follow`` says what it does to ids."""
        self._read(function.__name__, inputs, ())
        self._inside = True
        try:
            out = function(*args)
        finally:
            self._inside = False
        follow(out)
        return out

    def _read(self, name: str, inputs: list[Tensor], given: tuple[float | complex, ...]) -> None:
        t = self.state
        self._meet_inputs()
        t.where = f"{name} in {t.frames[-1].path or 'the model'}"
        if name not in _SHAPES_ALONE:
            t.read(inputs)
            remains.read(t, name, given, inputs)
        for producer in t.producers(inputs):
            producer.readers += 1

    def _number(self, name: str, outputs: list[Tensor], given: tuple[float | complex, ...]) -> None:
        """Remember an operator by its place in its module's call."""
        t = self.state
        place = t.frames[-1].place
        t.lengths[place] = tuple(tuple(x.shape) if t.known(x) else None for x in outputs)
        t.produced_ids[place] = name, [t.ids(x) for x in outputs]
        if given:
            t.numbers[place] = given
        t.frames[-1].operators += 1

    def _meet_inputs(self) -> None:
        """Integers of a module may be what it asks of its inputs' extents."""
        t = self.state
        for frame in reversed(t.frames):
            if frame.met:
                return
            frame.met = True
            if t.of_torch(frame.path) and not t.modules[frame.path]._modules:
                continue  # layers; what holds others checks their width, ``nn.Transformer`` for one
            for tensor in frame.args:
                if not isinstance(tensor, Tensor):
                    continue
                columns = t.ids(tensor)
                for column in columns:
                    if column is not None:
                        named = (name for name, n in t.integers(frame.path) if n == len(column))
                        t.asked += [Binding(frame.path, name, None, column) for name in named]
                for name, last in t.shapes(frame.path, tensor):  # ``normalized_shape``, for one
                    found = zip(range(last), columns[len(columns) - last :], strict=True)
                    t.asked += [Binding(frame.path, name, index, column) for index, column in found if column is not None]

    def _refuse(self, func: Any, inputs: list[Tensor]) -> None:
        self.state.joined = None  # something may be resized in place
        for tensor in inputs:
            met = self.state.ids(tensor)
            if len(met) != tensor.dim():
                self.state.set(tensor, [None] * tensor.dim())
            for ids in met:
                if ids is not None:
                    self.state.lock(ids, f"no rule for {func.overloadpacket}")
                    self.state.refused.append((str(func.overloadpacket), ids))


def _positive(a: SimpleNamespace) -> SimpleNamespace:
    """Count dimensions from the left, so that rules need not ask."""
    rank = a.input.dim() if isinstance(getattr(a, "input", None), Tensor) else 0
    if rank:
        for name in ("dim", "dim0", "dim1"):
            value = getattr(a, name, None)
            if type(value) is int and -rank <= value < 0:
                setattr(a, name, value + rank)
        if getattr(a, "dims", None) is not None:
            a.dims = [d % rank for d in a.dims]
    return a


def run(model: nn.Module, example: Example, training: bool = False, copies: Copies = NONE, tells: bool = False) -> TraceState:
    """Trace the model on an example; the model is left exactly as it was.

    What evaluation mode does not run is followed in training mode; with ``training`` everything is, a second time. Of a copy
    and its original the one is observed that evaluation mode runs: where that is the copy, the two change places.

    Raises:
        TraceError: the model fails on the example.
    """
    with GARBAGE.turned():
        state = settled(functools.partial(_run, model, example, training, tells, copies))
        led = led_by({path for path, _, _ in state.produced_ids}, copies)
        return state if led == copies else settled(functools.partial(_run, model, example, training, tells, led))


def _run(model: nn.Module, example: Example, training: bool, tells: bool, copies: Copies, hints: Hints) -> TraceState:
    names: dict[int, str] = {}
    storages = {}
    for name, tensor in _held(model):
        if isinstance(tensor, nn.parameter.UninitializedTensorMixin):  # type: ignore[attr-defined]
            raise TraceError(f"parameter {name} is not initialised; run the model once before pruning it")
        names[id(tensor)] = name
    names.update(named_alike(names, model, copies))
    for _, tensor in _held(model):
        if tensor.numel() and tensor.layout == torch.strided:
            storages[(tensor.data_ptr(), tuple(tensor.shape), tuple(tensor.stride()))] = names[id(tensor)]
    modules, reads = dict(model.named_modules()), Reads(keeps=tells)
    state = TraceState(names=names, modules=modules, storages=storages, hints=hints, copies=copies, reads=reads)
    with undisturbed(model):
        try:
            _follow(model, example, state)
        except ActPruneError:
            raise
        except Exception as error:
            raise TraceError(
                f"the model failed on the example inputs {_describe(example)}: {type(error).__name__}: {error}; "
                "pass example_inputs as the model takes them: a tensor, a tuple of arguments, a dict of keyword arguments, "
                "or a callable that takes the model"
            ) from error
    for bindings in (state.bindings, state.possible, state.asked):  # what a forward makes itself, it makes anew
        kept = (one for one in bindings if one.attribute.partition(".")[0] in vars(state.modules[one.module]))
        bindings[:] = [one for one in kept if not is_copied(one.module, copies)]
    whole = all(names[id(parameter)] in state.tensor_ids for parameter in model.parameters())
    if training or not whole:
        _in_training(model, example, state)
    if not whole:
        follow_twins(model, state)
    state.contractions[:] = [one for one in state.contractions if not is_copied(one.module, copies)]
    return state


def _held(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of parameters, buffers, and tensors that are neither: a table kept as a plain attribute."""
    yield from model.named_parameters()
    yield from model.named_buffers()
    for path, module in model.named_modules():
        for name, value in vars(module).items():
            if isinstance(value, Tensor):
                yield f"{path}.{name}" if path else name, value


def _follow(model: nn.Module, example: Example, state: TraceState) -> None:
    with module_stack(model, None if state.training else state.calls) as state.frames:
        tracer = ChannelTracer(state)
        listing = Listing(functools.partial(state.reads.listed, state))
        with tracer, listing, Comparisons(state), Wholes(tracer) if wanted(model) else nullcontext():
            output = call(model, example)
        state.joined = None  # which keeps tensors
        state.where = "the model's output"
        returned = list(_tensors(output))
        state.read(returned)
        remains.read(state, "output", (), returned)
        before = len(state.space.locks)
        for tensor in returned:
            for ids in state.ids(tensor):
                state.space.lock(ids, "reaches the model's output")
        if not state.training:
            state.returned = range(before, len(state.space.locks))


def _in_training(model: nn.Module, example: Example, state: TraceState) -> None:
    """Follow the branches that run in training mode only, auxiliary heads for one; of two samples if one does not do."""
    state.training = True
    for inputs in once_and_twice(example):
        with undisturbed(model):
            model.train()
            try:
                return _follow(model, inputs, state)
            except Exception:
                # a model that needs targets to train: what was seen of it holds, the rest stays as it is
                continue
    return None


_INTERNAL = ("hidden_state", "attentions", "past_key_values", "mems")
"""Entries of an output beside its logits that show what went on inside: their widths may change."""


def _listed(values: Iterable[Any]) -> list[Tensor]:
    """Tensors among an operator's arguments or results, which lists may hold; asked for with every operator, hence so plain."""
    found: list[Tensor] = []
    for value in values:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, (list, tuple)):
            found += value if set(map(type, value)) == {Tensor} else _listed(value)
    return found


def _tensors(output: Any) -> Iterator[Tensor]:
    """Every tensor inside an output, however it is wrapped."""
    if isinstance(output, Tensor):
        yield output
    elif "Cache" in type(output).__name__:
        return  # a decoder's cache is state for its own next call: its width may change
    elif isinstance(output, Mapping):
        answered = any("logits" in str(key) for key in output)
        for key, value in output.items():
            if not (answered and any(word in str(key) for word in _INTERNAL)):
                yield from _tensors(value)
    elif isinstance(output, (list, tuple, set)):
        for value in output:
            yield from _tensors(value)
    elif dataclasses.is_dataclass(output) or hasattr(output, "__dict__"):
        for value in vars(output).values():
            yield from _tensors(value)


def _describe(example: Any) -> str:
    if isinstance(example, Tensor):
        return f"of shape {tuple(example.shape)} and dtype {example.dtype}"
    if isinstance(example, Mapping):
        return "(" + ", ".join(f"{k} {_describe(v)}" for k, v in example.items()) + ")"
    if isinstance(example, (tuple, list)):
        return "(" + ", ".join(_describe(v) for v in example) + ")"
    return f"({type(example).__name__})"
