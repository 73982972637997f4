"""What a run needs to go back to an earlier network: its shapes and values, its optimizers, and the best values seen with it.

Kept in CPU memory, one copy of the LightningModule and of the optimizers' state, and in checkpoints, so that a resumed run
can go back too. Options of optimizers (the learning rate among them), schedulers and random numbers are not part of it:
time goes on.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from itertools import compress
from typing import Any

import torch
from lightning import LightningModule, Trainer
from torch import Tensor, nn
from torch.optim import LBFGS, Optimizer

from actprune.core.errors import ConfigError
from actprune.core.record import SurgeryRecord
from actprune.training.copies import holders
from actprune.training.references import optimizers_of
from actprune.training.resume import CheckpointHooks
from actprune.training.strategy import best_values, return_to_best

Values = dict[str, Tensor]


@dataclass(frozen=True)
class Snapshot:
    """A network with everything that trains it; plain containers and tensors."""

    records: dict[str, dict[str, Any]]
    """Path of a network -> its surgery record."""
    values: Values
    """Name -> every parameter and buffer of the LightningModule, those outside the state dict too."""
    optimizers: list[dict[str, Any]]
    """Per optimizer: state by parameter name."""
    copies: list[Values]
    """The same as ``values`` of every averaged copy that a callback holds."""
    best: dict[str, Any]
    """What early stopping, monitored checkpoints and plateau schedulers compare with."""

    @classmethod
    def take(cls, trainer: Trainer, hooks: CheckpointHooks) -> Snapshot:
        """Copy the present state to the CPU.

        Raises:
            ConfigError: an optimizer trains parameters that are no part of the LightningModule.
        """
        task = hooks.task
        return cls(
            records={path: record.to_dict() for path, record in hooks.records().items()},
            values=_copied(task),
            optimizers=[_state(optimizer, task) for optimizer in optimizers_of(trainer, task)],
            copies=[_copied(holder) for holder in holders(task)],
            best=best_values(trainer),
        )

    def restore(self, trainer: Trainer, hooks: CheckpointHooks) -> None:
        """Give network, copies and optimizers the state they had; the trainer's wrappers still need to be told."""
        optimizers = optimizers_of(trainer, hooks.task)  # found by the parameters that they train now
        names = _names(hooks.task)
        trained = [[[names.get(id(p), p) for p in group["params"]] for group in o.param_groups] for o in optimizers]
        hooks.reshape({path: SurgeryRecord.from_dict(record) for path, record in self.records.items()})
        _fill(hooks.task, self.values)
        for holder, values in zip(holders(hooks.task), self.copies, strict=True):
            _fill(holder, values)
        parameters = dict(hooks.task.named_parameters())
        states = [*self.optimizers, *({} for _ in optimizers)]  # one that came since has none to go back to
        for optimizer, groups, state in zip(optimizers, trained, states, strict=False):
            _refill(optimizer, groups, state, parameters)
        return_to_best(trainer, self.best)

    def to_dict(self) -> dict[str, Any]:
        """Plain containers and tensors: loads with ``weights_only=True``."""
        return asdict(self)

    @classmethod
    def from_dict(cls, state: Mapping[str, Any]) -> Snapshot:
        """Inverse of ``to_dict``."""
        return cls(**state)


def check_optimizers(optimizers: Iterable[Optimizer], task: LightningModule) -> None:
    """Refuse optimizers whose parameters have no name, by which they would be found again.

    Raises:
        ConfigError: an optimizer trains parameters that are no part of the LightningModule.
    """
    names = _names(task)
    for optimizer in optimizers:
        unknown = [tuple(p.shape) for group in optimizer.param_groups for p in group["params"] if id(p) not in names]
        if unknown:
            raise ConfigError(
                f"{type(optimizer).__name__} trains {len(unknown)} parameters that are no part of {type(task).__name__}, the "
                f"first of shape {unknown[0]}, so checkpoints do not hold them and max_metric_drop cannot go back; assign "
                "their module to an attribute of the LightningModule"
            )


def _names(task: nn.Module) -> dict[int, str]:
    return {id(parameter): name for name, parameter in task.named_parameters()}


def _held(module: nn.Module) -> Values:
    parameters = dict(module.named_parameters(remove_duplicate=False))
    return {**parameters, **dict(module.named_buffers(remove_duplicate=False))}


def _copied(module: nn.Module) -> Values:
    return {name: value.detach().to("cpu", copy=True) for name, value in _held(module).items()}


@torch.no_grad()
def _fill(module: nn.Module, values: Values) -> None:
    for name, held in _held(module).items():
        if name in values:
            held.copy_(values[name])


def _state(optimizer: Optimizer, task: LightningModule) -> dict[str, Any]:
    check_optimizers([optimizer], task)
    names = _names(task)
    return {
        names[id(parameter)]: {key: _portable(value, parameter) for key, value in held.items()}
        for parameter, held in optimizer.state.items()
        if id(parameter) in names
    }


def _refill(
    optimizer: Optimizer, trained: list[list[Any]], state: Mapping[str, Any], parameters: Mapping[str, nn.Parameter]
) -> None:
    """Let an optimizer train what it trains, also in groups that came since (unfrozen layers), without biases that are gone."""
    for group, names in zip(optimizer.param_groups, trained, strict=True):
        stays = [not isinstance(name, str) or name in parameters for name in names]
        present = [parameters[name] if isinstance(name, str) else name for name in compress(names, stays)]
        group["params"][:] = present  # in place: LBFGS holds the list itself
        if "param_names" in group:
            group["param_names"][:] = compress(group["param_names"], stays)
    optimizer.state.clear()
    for name, held in state.items():
        parameter = parameters[name]
        optimizer.state[parameter] = {key: _home(value, parameter) for key, value in held.items()}
    if isinstance(optimizer, LBFGS):
        optimizer._numel_cache = None


def _portable(value: Any, parameter: Tensor) -> Any:
    """A copy on the CPU with a note of whether it lay with its parameter (step counters may not)."""
    if isinstance(value, Tensor):
        return {"tensor": value.detach().to("cpu", copy=True), "beside": value.device.type == parameter.device.type}
    return [_portable(item, parameter) for item in value] if isinstance(value, list) else value


def _home(value: Any, parameter: Tensor) -> Any:
    if isinstance(value, dict):
        return value["tensor"].to(parameter.device if value["beside"] else "cpu", copy=True)
    return [_home(item, parameter) for item in value] if isinstance(value, list) else value
