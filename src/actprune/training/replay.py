"""Run a LightningModule's ``validation_step`` outside the loop, once more on a kept batch, and leave no trace of it."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

from lightning import LightningModule
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torchmetrics import Metric

from actprune.core.calling import tensors_of
from actprune.core.contents import Contents, inside
from actprune.core.hooks import Live
from actprune.core.unwritten import Unwritten

_OWN = frozenset(vars(LightningModule()))  # what Lightning and torch keep in every module


@dataclasses.dataclass(frozen=True)
class Replay:
    """An example for tracing: whatever module is traced, ``validation_step`` runs it."""

    task: LightningModule
    batch: Any
    dataloader_idx: int = 0
    """Of the loader that the batch is from."""

    def __call__(self, network: nn.Module) -> Any:
        """Run the step; the result holds what it returned, and what the network (or the last of several) returned."""
        results: list[Any] = []

        def keep_last(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            results[:] = [output]

        with harmless(self.task), ExitStack() as stack:
            stack.enter_context(_others_evaluating(self.task, network))
            for child in self.task.children() if network is self.task else [network]:
                if is_network_part(child):
                    stack.callback(child.register_forward_hook(Live(keep_last)).remove)
            result = validate(self.task, self.batch, self.dataloader_idx)
        return [leaf for leaf in tree_leaves([result, results]) if isinstance(leaf, Tensor)]


def validate(task: LightningModule, batch: Any, dataloader_idx: int = 0) -> Any:
    """Call ``validation_step`` as Lightning's loop does: with as many of its arguments as it takes."""
    step = task.validation_step
    arguments = [batch]
    if is_param_in_hook_signature(step, "batch_idx", min_args=2):
        arguments.append(0)
        if is_param_in_hook_signature(step, "dataloader_idx", explicit=True, min_args=3):
            arguments.append(dataloader_idx)
    return step(*arguments)


@contextmanager
def _others_evaluating(task: LightningModule, network: nn.Module) -> Iterator[None]:
    parts = set(map(id, network.modules()))
    modes = [(module, module.training) for module in task.modules() if id(module) not in parts]
    for module, _ in modes:
        module.training = False
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


@contextmanager
def harmless(task: LightningModule) -> Iterator[None]:
    """Let ``validation_step`` run outside the loop: nothing is logged, by ``log`` or to loggers, and nothing is left of it.

    Put back are the LightningModule's attributes and the content of metrics, lists, sets, dicts, arrays, plain objects and of
    what these hold, with all tensors among them.
    """
    attributes, trainer = dict(vars(task)), task._trainer
    loggers = [] if trainer is None else trainer.loggers
    found = list(inside(value for name, value in attributes.items() if name not in _OWN))
    contents = Contents(found)
    modules = [*task.modules(), *(part for value in found if isinstance(value, nn.Module) for part in value.modules())]
    metrics = [(module, dict(vars(module)), _states(module)) for module in modules if isinstance(module, Metric)]
    for name in ("log", "log_dict"):
        object.__setattr__(task, name, _ignore)
    if trainer is not None:
        trainer.loggers = [DummyLogger() for _ in loggers]
    try:
        with Unwritten([*task.parameters(), *tensors_of(found)]):
            yield
    finally:
        if trainer is not None:
            trainer.loggers = loggers
        vars(task).clear()
        vars(task).update(attributes)
        contents.put_back()
        for metric, fields, states in metrics:
            vars(metric).update(fields)
            for name, content in states.items():
                _refill(getattr(metric, name), content)


def is_network_part(module: nn.Module) -> bool:
    """Whether a module computes with parameters (metrics may hold some, and do not)."""
    return not isinstance(module, Metric) and any(True for _ in module.parameters())


def mapped(value: Any, function: Callable[[Tensor], Any]) -> Any:
    """A nested structure (mappings, tuples, lists, dataclasses) with ``function`` applied to its tensors."""
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, (Mapping, list)):
        other: Any = copy.copy(value)
        for key, item in value.items() if isinstance(value, Mapping) else enumerate(value):
            other[key] = mapped(item, function)
        return other
    if isinstance(value, tuple):
        items = [mapped(item, function) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else tuple(items)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        twin = copy.copy(value)
        for entry in dataclasses.fields(value):
            object.__setattr__(twin, entry.name, mapped(getattr(value, entry.name), function))
        return twin
    return value


def copied(value: Any) -> Any:
    """A nested structure with copies of its tensors."""
    return mapped(value, lambda tensor: tensor.detach().clone())


def _states(metric: Metric) -> dict[str, Any]:
    return {name: copied(getattr(metric, name)) for name in metric._defaults}


def _refill(value: Any, content: Any) -> None:
    # in place: a metric collection shares one state among several metrics, and users keep references
    if isinstance(value, Tensor):
        value.copy_(content)
    else:
        value.clear()
        value.extend(content)


def _ignore(*args: Any, **kwargs: Any) -> None:
    return None
