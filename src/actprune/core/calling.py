"""Call a model on an example as its user would, and leave no trace of having done so."""

from __future__ import annotations

import contextvars
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from itertools import chain
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from actprune.core.contents import Contents, inside, restore
from actprune.core.hooks import uncompiled
from actprune.core.switches import EVERY_MODULE, GENERATOR, PLAIN_ATTENTION
from actprune.core.unwritten import Unwritten

Example: TypeAlias = "Tensor | tuple[Any, ...] | list[Any] | Mapping[str, Any] | Callable[[nn.Module], Any]"
"""A tensor, a tuple of positional arguments, a mapping of keyword arguments, or ``lambda model: ...``."""


def call(model: nn.Module, example: Example) -> Any:
    """Run the model on an example: ``model(x)``, ``model(*args)``, ``model(**kwargs)`` or ``example(model)``.

    Tensors are moved to ``device_of`` the model. A list is one argument (detection models take a list of
    images), a tuple is several.
    """
    # context variables that a model leaves behind when it fails half-way must not meet its next call
    return contextvars.copy_context().run(_call, model, example)


def _call(model: nn.Module, example: Example) -> Any:
    device = device_of(model)
    if isinstance(example, Tensor):
        return model(example.to(device))
    if isinstance(example, tuple):
        return model(*_to(example, device))
    if isinstance(example, Mapping):
        return model(**_to(dict(example), device))
    if isinstance(example, list):
        return model(_to(example, device))
    return example(model)


def device_of(model: nn.Module) -> torch.device:
    """Where the model's first parameter is, without parameters its first buffer; the CPU if it has neither."""
    return next((tensor.device for tensor in chain(model.parameters(), model.buffers())), torch.device("cpu"))


def _to(tree: Any, device: torch.device) -> Any:
    return tree_map_only(Tensor, lambda x: x.to(device), tree)


def once_and_twice(example: Example) -> Iterator[Example]:
    """The example, then each of its samples two times, if they can be: a batch norm in training mode insists on two."""
    yield example
    try:
        doubled = tree_map_only(Tensor, lambda x: torch.cat([x, x]) if x.dim() else x, example)
    except Exception:  # a sparse matrix in compressed rows, for one
        return
    yield doubled


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode inside the block, with every module called; afterwards its own training flag is as it was."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with EVERY_MODULE.turned():
            yield
    finally:
        try:
            for module, training in modes:
                if training and not module.training and type(module).train is not nn.Module.train:
                    module.train(True)  # more than a flag: adapters leave the weights that they are merged into
        finally:
            for module, training in modes:
                module.training = training


_REGISTERED = (
    "_parameters",
    "_buffers",
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
)
_OF_MODULES = frozenset(vars(nn.Module()))  # what PyTorch keeps in every module


_WATCHING = ("wandb", "comet_ml")
"""Packages whose hooks log what a module computes: nothing of the model, and not to be told of these runs."""


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, no gradients, no autocast, no fused attention, unwatched; afterwards everything is as it was.

    Restores the attributes and hooks of every module (its training flag among them) with what lists, dicts, arrays and plain
    objects among them hold, parameters, buffers and other tensors that were written to or replaced, and the random number
    generators.
    """
    # in no dict: the hash of a metric changes with its content
    modules = [(module, type(module), dict(vars(module)), _registered(module)) for module in model.modules()]
    scripted = [(module, module.training) for module, *_ in modules if isinstance(module, torch.jit.ScriptModule)]
    for module, *_ in modules:
        _unwatch(module)
    found = list(inside(value for *_, held, _ in modules for name, value in held.items() if name not in _OF_MODULES))
    contents = Contents(found)
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    devices = sorted({p.device.index or 0 for p in model.parameters() if p.device.type == "cuda"})
    with ExitStack() as stack:
        stack.enter_context(GENERATOR.turned())
        stack.enter_context(torch.random.fork_rng(devices=devices))
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.no_grad())
        for kind in {p.device.type for p in model.parameters()} | {"cpu"}:
            if torch.amp.is_autocast_available(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        stack.enter_context(uncompiled())
        stack.enter_context(PLAIN_ATTENTION.turned())
        try:
            with Unwritten([*model.parameters(), *tensors_of(found)]):  # which is over before anything is put back
                model.eval()
                yield
        finally:
            for module, its_class, held, registered in modules:
                if type(module) is not its_class:
                    continue  # a lazy layer that knows its shape now
                restore(vars(module), held)
                for name, content in registered.items():
                    restore(getattr(module, name), content)
            for part, training in scripted:  # which keep their flag elsewhere
                part.training = training
            for buffer, before in buffers:
                # by value: a batch norm in training mode writes without counting a version
                if not buffer.is_meta and not torch.equal(_dense(buffer), _dense(before)):
                    with torch.inference_mode(buffer.is_inference()):
                        buffer.copy_(before)
            contents.put_back()


def _registered(module: nn.Module) -> dict[str, dict[Any, Any]]:
    return {name: dict(getattr(module, name)) for name in _REGISTERED}


def tensors_of(found: Iterable[Any]) -> Iterator[Tensor]:
    """Tensors, and parameters and buffers of modules, among what is held."""
    for value in found:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, nn.Module):
            yield from value.parameters()
            yield from value.buffers()


def _dense(buffer: Tensor) -> Tensor:
    """PyTorch compares no sparse tensors."""
    return buffer if buffer.layout == torch.strided else buffer.to_dense()


def _unwatch(module: nn.Module) -> None:
    for hooks in (module._forward_hooks, module._forward_pre_hooks):
        for key, hook in list(hooks.items()):
            if str(getattr(hook, "__module__", "")).partition(".")[0] in _WATCHING:
                del hooks[key]
