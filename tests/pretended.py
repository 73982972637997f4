"""A device that is not there: its tensors lie in the CPU's memory and compute there, and say when somebody waits for them.

What is made for devices other than the CPU runs so on any machine: which of two ways is taken, whether tensors of two devices
meet, whether the host reads anything back. What depends on ``cuda`` by name (kernels, streams, pinned memory) does not.
"""

import traceback

import pytest
import torch
from torch import Tensor, nn
from torch.utils import backend_registration
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

NAME = "pretended"
_SETUP = "_setup_privateuseone_for_python_backend"
needs_pretending = pytest.mark.skipif(
    not hasattr(backend_registration, _SETUP), reason="this version of torch takes no devices that are written in Python"
)

WAITED_FOR = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "bincount", "aten.equal.", "is_nonzero")
"""Operators whose result, or its shape, the host must know."""


class Pretended(Tensor):
    """A tensor of the device, with one of the CPU inside."""

    @staticmethod
    def __new__(cls, x):
        made = Tensor._make_wrapper_subclass(
            cls, x.shape, strides=x.stride(), storage_offset=x.storage_offset(), dtype=x.dtype, device=f"{NAME}:0"
        )
        made.inside = x
        return made

    def data_ptr(self):
        """Where it lies, in the CPU's memory."""
        return self.inside.data_ptr()

    def untyped_storage(self):
        """What it lies in, of the CPU."""
        return self.inside.untyped_storage()

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return Device.run(func, args, kwargs or {})


class Device(TorchDispatchMode):
    """While it is entered, tensors can be made on the device ``NAME``. For a process of its own: this cannot be undone.

    Attributes:
        waits: what the host has waited for: the operator and where it was called.
    """

    waits: list[tuple[str, str]] = []

    def __init__(self):
        super().__init__()
        getattr(backend_registration, _SETUP)(NAME)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        there = any(isinstance(x, Pretended) for x in tree_leaves((args, kwargs)))
        if there or (kwargs.get("device") is not None and torch.device(kwargs["device"]).type == NAME):
            return self.run(func, args, kwargs)
        return func(*args, **kwargs)

    @classmethod
    def run(cls, func, args, kwargs):
        """Run an operator of which a tensor is, or its result will be, on the device."""
        name = str(func)
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        theirs = [x for x in tensors if isinstance(x, Pretended)]
        to = torch.device(kwargs["device"]).type if kwargs.get("device") is not None else NAME
        if theirs and (to != NAME or any(waited in name for waited in WAITED_FOR)):
            cls.waits.append((name, "".join(traceback.format_stack(limit=12))))
        if theirs and to == NAME and "copy_" not in name and any(x.dim() for x in tensors if not isinstance(x, Pretended)):
            raise RuntimeError(f"{name} takes tensors of two devices")
        if "device" in kwargs:
            kwargs = {**kwargs, "device": torch.device("cpu")}
        args, kwargs = tree_map(lambda x: x.inside if isinstance(x, Pretended) else x, (args, kwargs))
        known = {id(x.inside): x for x in theirs}  # of operators that write, the result is what was given

        def outside(x):
            return known.get(id(x), Pretended(x) if to == NAME else x) if isinstance(x, Tensor) else x

        return tree_map(outside, func(*args, **kwargs))


def put(model):
    """Move a model's parameters and buffers to the device."""
    for module in model.modules():
        for held in (module._parameters, module._buffers):
            for name, x in held.items():
                if x is not None:
                    there = Pretended(x.detach())
                    held[name] = nn.Parameter(there, requires_grad=False) if isinstance(x, nn.Parameter) else there
    return model
