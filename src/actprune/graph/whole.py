"""Calls that are followed as wholes: a recurrent layer runs one kernel or thousands, and means the same.

Below autograd its call is gone, so it is met above: in Python, where ``torch.nn`` makes it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import nn
from torch.overrides import TorchFunctionMode

from actprune.graph.rules.recurrent import GATES, Call, is_recurrent, recurrent

if TYPE_CHECKING:
    from actprune.graph.tracer import ChannelTracer


class Wholes(TorchFunctionMode):
    """Hands calls of recurrent layers to the tracer."""

    def __init__(self, tracer: ChannelTracer) -> None:
        super().__init__()
        self.tracer = tracer

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # noqa: D102
        t = self.tracer.state
        if func in GATES and is_recurrent(t.modules[t.stack[-1]]):
            seen = Call.of(func, args)
            return self.tracer.whole(func, args, seen.tensors, lambda out: recurrent(t, seen, out))
        return func(*args, **(kwargs or {}))


def wanted(model: nn.Module) -> bool:
    """Whether a model has modules whose calls are followed as wholes."""
    return any(is_recurrent(module) for module in model.modules())
