"""What the library calls are given, checked by kind before anything runs: a class for an instance, a number for a budget."""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from torch.utils._pytree import tree_leaves

from actprune.compensation import Compensation, LeastSquares
from actprune.core.budget import Budget
from actprune.core.checks import is_whole
from actprune.core.errors import ConfigError, ObservationError, SurgeryError, TraceError
from actprune.core.views import Criterion
from actprune.graph import Graph
from actprune.pruning.select import Selection

_LOG = logging.getLogger(__name__)
REFIT = LeastSquares()
"""What the library calls fold in where nothing is said; known by identity, for ``prune`` without data leaves it out."""
_KINDS: dict[str, tuple[type, bool, str]] = {
    "criterion": (Criterion, False, "an instance, e.g. criterion=actprune.criteria.Entropy()"),
    "budget": (Budget, False, "e.g. budget=actprune.Budget(params=0.4)"),
    "selection": (Selection, True, "e.g. selection=actprune.Selection(round_to=8), or None"),
    "compensation": (Compensation, True, "an instance, e.g. compensation=actprune.compensation.Mean(), or None"),
}
"""Argument -> (kind, whether None will do, the cure)."""


def check_arguments(**given: Any) -> None:
    """Refuse criteria, budgets, selections, compensations and seeds of another kind.

    Raises:
        ConfigError: an argument is of another kind.
    """
    for name, value in given.items():
        if name == "seed":
            if not is_whole(value):
                raise ConfigError(f"seed={value!r} must be a whole number, e.g. seed=0")
            continue
        kind, optional, cure = _KINDS[name]
        if not isinstance(value, kind) and not (optional and value is None):
            raise ConfigError(f"{name}={value!r} is no {kind.__name__}; pass {cure}")


def check_model(model: Any) -> None:
    """Refuse what is no module, has no values, or runs outside of Python.

    Raises:
        TraceError: nothing could be followed through the model.
    """
    name = type(model).__name__
    if not isinstance(model, nn.Module):
        raise TraceError(f"{model!r} is no torch.nn.Module; pass the model first, then its example inputs")
    if isinstance(model, torch.jit.ScriptModule):
        raise TraceError(f"{name} is TorchScript, which runs outside of Python; prune the module, then script it")
    empty = next((key for key, value in [*model.named_parameters(), *model.named_buffers()] if value.is_meta), None)
    if empty is not None:
        raise TraceError(f"{empty} of {name} is on the meta device and holds no values; load weights first, or build it on cpu")


def check_example(example: Any) -> None:
    """Refuse an example without samples: nothing would be computed, or counted, on it.

    Raises:
        TraceError: a tensor of the example has no elements at all, and no other has any.
    """
    shapes = [tuple(leaf.shape) for leaf in tree_leaves(example) if isinstance(leaf, Tensor)]
    if shapes and all(0 in shape for shape in shapes):
        raise TraceError(f"the example inputs of shape {shapes[0]} hold no sample; pass at least 1")


def check_data(data: Any) -> None:
    """Refuse what is no iterable of batches though it can be iterated over.

    Raises:
        ObservationError: data would be read sample by sample, key by key or letter by letter.
    """
    if isinstance(data, Tensor):
        raise ObservationError(
            f"data is one tensor of shape {tuple(data.shape)}, which would be read row by row; pass batches, e.g. "
            "data=[tensor] or data=tensor.split(64)"
        )
    if isinstance(data, (dict, str, bytes)) or not (hasattr(data, "__iter__") or hasattr(data, "__getitem__")):
        raise ObservationError(f"data is of type {type(data).__name__}; pass an iterable of batches, e.g. data=[batch]")


def check_wrapper(model: Any) -> None:
    """Refuse a wrapper that would go on with the parameters that there were.

    Raises:
        TraceError: the model is wrapped for several processes.
    """
    if isinstance(model, DistributedDataParallel):
        raise TraceError("DistributedDataParallel reduces the parameters it was built with; prune model.module, then wrap it")


def tell_strangers(model: nn.Module, optimizers: list[Optimizer]) -> None:
    """Say which optimizers train nothing of the model: those of a copy, or from before the last cut, do not follow."""
    known = {id(parameter) for parameter in model.parameters()}
    for one in optimizers:
        if not any(id(parameter) in known for group in one.param_groups for parameter in group["params"]):
            _LOG.warning(
                "%s trains no parameter of %s, so it does not follow the cut; make it of this model's parameters",
                type(one).__name__, type(model).__name__,
            )  # fmt: skip


def as_optimizers(given: Any) -> list[Optimizer]:
    """The optimizers as a list; one alone will do.

    Raises:
        ConfigError: something else is among them.
    """
    found = [given] if isinstance(given, Optimizer) else list(given)
    for one in found:
        if not isinstance(one, Optimizer):
            raise ConfigError(f"optimizers holds {one!r}, which is no torch.optim.Optimizer; pass optimizers=[optimizer]")
    return found


def check_unchanged(model: nn.Module, graph: Graph) -> None:
    """Refuse to go on with a model that somebody else has cut meanwhile.

    Raises:
        SurgeryError: a tensor has another shape than when the model was traced.
    """
    held = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    for name, shape in graph.shapes.items():
        if name in held and tuple(held[name].shape) != tuple(shape):
            raise SurgeryError(
                f"{name} has shape {tuple(held[name].shape)}, it had {tuple(shape)} when this pruner traced the model; make a "
                "new Pruner of it"
            )
