"""Call a model on an example as its user would, and leave no trace of having done so."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_map_only

Example: TypeAlias = "Tensor | tuple[Any, ...] | list[Any] | Mapping[str, Any] | Callable[[nn.Module], Any]"
"""A tensor, a tuple of positional arguments, a mapping of keyword arguments, or ``lambda model: ...``."""


def call(model: nn.Module, example: Example) -> Any:
    """Run the model on an example: ``model(x)``, ``model(*args)``, ``model(**kwargs)`` or ``example(model)``.

    Tensors are moved to the device of the model's first parameter. A list is one argument (detection models take a list of
    images), a tuple is several.
    """
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    if isinstance(example, Tensor):
        return model(example.to(device))
    if isinstance(example, tuple):
        return model(*_to(example, device))
    if isinstance(example, Mapping):
        return model(**_to(dict(example), device))
    if isinstance(example, list):
        return model(_to(example, device))
    return example(model)


def _to(tree: Any, device: torch.device) -> Any:
    return tree_map_only(Tensor, lambda x: x.to(device), tree)


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, no gradients, no autocast, no fused attention; afterwards everything is as it was.

    Restores the training flag of every module, buffers that were written to, and the random number generators.
    """
    modes = {module: module.training for module in model.modules()}
    buffers = {name: (buffer, buffer._version, buffer.clone()) for name, buffer in model.named_buffers()}
    devices = sorted({p.device.index or 0 for p in model.parameters() if p.device.type == "cuda"})
    fastpath = torch.backends.mha.get_fastpath_enabled()
    with ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(devices=devices))
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.no_grad())
        for kind in {p.device.type for p in model.parameters()} | {"cpu"}:
            if torch.amp.is_autocast_available(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        torch.backends.mha.set_fastpath_enabled(False)
        model.eval()
        try:
            yield
        finally:
            torch.backends.mha.set_fastpath_enabled(fastpath)
            for module, training in modes.items():
                module.training = training
            for buffer, version, before in buffers.values():
                if buffer._version != version:
                    buffer.copy_(before)
