"""Checkpoints of a pruned LightningModule: the surgery record travels with the weights, loading rebuilds the shapes.

Lightning loads weights before any callback hears of the checkpoint, and leaves callbacks out of weights-only
checkpoints; only the LightningModule's own hooks see every checkpoint at the right moment. So the callback wraps
those two hooks on the instance; the hooks of its class still run.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from lightning import LightningModule
from torch import nn

from actprune.core.errors import ConfigError
from actprune.core.record import ATTRIBUTE, SurgeryRecord, record_of
from actprune.surgery import apply_record

KEY = "actprune"
"""Where a Lightning checkpoint carries the surgery record."""


class CheckpointHooks:
    """The two checkpoint hooks of one LightningModule, wrapped.

    Args:
        task: the LightningModule whose hooks are wrapped.
    """

    def __init__(self, task: LightningModule) -> None:
        self.task = task
        self.path = ""
        """Dotted name of the pruned network in the LightningModule."""
        self._shapes: Shapes | None = None
        self._after_load = task.on_load_checkpoint
        self._after_save = task.on_save_checkpoint

    @classmethod
    def attach(cls, task: LightningModule) -> CheckpointHooks:
        """Wrap the hooks of ``task``, once however often it is called."""
        present = getattr(vars(task).get("on_load_checkpoint"), "__self__", None)
        if isinstance(present, cls):
            return present
        hooks = cls(task)
        object.__setattr__(task, "on_load_checkpoint", hooks.load)
        object.__setattr__(task, "on_save_checkpoint", hooks.save)
        return hooks

    @property
    def network(self) -> nn.Module:
        """The pruned network."""
        return self.task.get_submodule(self.path)

    def remember_original(self) -> None:
        """Note the shapes of a network that has not been cut yet, so that earlier checkpoints can be loaded later."""
        if not record_of(self.network):
            self._shapes = Shapes.of(self.network)

    def save(self, checkpoint: dict[str, Any]) -> None:
        """Put the surgery record into a checkpoint."""
        record = record_of(self.network)
        if record:
            checkpoint[KEY] = {"path": self.path, "record": record.to_dict()}
        self._after_save(checkpoint)

    def load(self, checkpoint: dict[str, Any]) -> None:
        """Give the network the shapes of a checkpoint, before its weights are loaded.

        Raises:
            ConfigError: the network is cut already, otherwise than the checkpoint, and its original shapes are unknown.
        """
        wanted = SurgeryRecord()
        if KEY in checkpoint:
            self.path = checkpoint[KEY]["path"]
            wanted = SurgeryRecord.from_dict(checkpoint[KEY]["record"])
        present = record_of(self.network)
        if present.removed != wanted.removed:
            if present:
                self._restore_original()
            if wanted:
                apply_record(self.network, wanted)
        self._after_load(checkpoint)

    def _restore_original(self) -> None:
        if self._shapes is None:
            raise ConfigError(
                f"{type(self.task).__name__} is pruned already and the checkpoint holds another shape; "
                "load the checkpoint into a module of the original shape"
            )
        self._shapes.restore(self.network, record_of(self.network))
        delattr(self.network, ATTRIBUTE)


@dataclass(frozen=True)
class Shapes:
    """The shapes of a network: every tensor's, and every number in an attribute of its modules."""

    tensors: dict[str, dict[str, torch.Size]]
    """Module name -> parameter or buffer name -> shape."""
    attributes: dict[str, dict[str, Any]]
    """Module name -> attribute name -> int, or tuple or list of ints."""

    @classmethod
    def of(cls, network: nn.Module) -> Shapes:
        """Note the shapes of a network."""
        tensors, attributes = {}, {}
        for name, module in network.named_modules():
            held = {**module._parameters, **module._buffers}
            tensors[name] = {key: value.shape for key, value in held.items() if value is not None}
            attributes[name] = {
                key: type(value)(value) for key, value in vars(module).items() if _is_size(value) and key != "training"
            }
        return cls(tensors, attributes)

    def restore(self, network: nn.Module, record: SurgeryRecord) -> None:
        """Give a cut network its original shapes again; tensors that change hold nothing until weights are loaded."""
        made: dict[int, nn.Parameter] = {}  # a tied parameter stays tied
        for name, module in network.named_modules():
            own = type(module).__module__.startswith("torch.nn.")  # all its numbers are sizes; a user's may be counters
            for key, value in self.attributes[name].items():
                if own or key in record.attributes.get(name, ()):
                    setattr(module, key, type(value)(value))
            known = self.tensors[name]
            for key, value in [*module._parameters.items(), *module._buffers.items()]:
                if value is None:
                    continue
                if key not in known:  # a bias that compensation gave
                    module._parameters[key] = None
                    continue
                shape = known[key]
                if value.shape == shape:
                    continue
                if key in module._buffers:
                    module._buffers[key] = value.new_zeros(shape)
                    continue
                if id(value) not in made:
                    made[id(value)] = nn.Parameter(value.new_zeros(shape), requires_grad=value.requires_grad)
                module._parameters[key] = made[id(value)]


def _is_size(value: Any) -> bool:
    if isinstance(value, (tuple, list)) and type(value) in (tuple, list):
        return bool(value) and all(type(item) is int for item in value)
    return type(value) is int
