"""Wrappers that call one module and hold nothing of their own: what is pruned, named and saved is the module inside."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

PREFIXES = ("_orig_mod.", "module.")
"""What wrappers put before the names of the module inside: ``torch.compile``, and the parallel ones."""


def unwrapped(model: nn.Module) -> nn.Module:
    """The module inside ``torch.compile(model)``, ``DataParallel`` and ``DistributedDataParallel``; any other as it is."""
    while True:
        if isinstance(model, (DataParallel, DistributedDataParallel)):
            model = model.module
        elif type(model).__name__ == "OptimizedModule" and isinstance(inside := model._modules.get("_orig_mod"), nn.Module):
            model = inside
        else:
            return model


def compile_anew(model: nn.Module) -> None:
    """Forget what was compiled of a model, if anything was: after eight times for other shapes PyTorch would give up."""
    if getattr(model, "_compiler_ctx", None) is not None or any(map(_is_compiled, model.modules())):
        torch.compiler.reset()


def _is_compiled(module: nn.Module) -> bool:
    """Whether a module, or a method in its attributes, was compiled."""
    if type(module).__name__ == "OptimizedModule" or module._compiled_call_impl is not None:
        return True
    return any(callable(value) and hasattr(value, "_torchdynamo_orig_callable") for value in vars(module).values())
