"""Checkpoints of a pruned LightningModule: the surgery record travels with the weights, loading rebuilds the shapes.

Lightning loads weights before any callback hears of the checkpoint, and leaves callbacks out of weights-only
checkpoints; only the LightningModule's own hooks see every checkpoint at the right moment. So the callback wraps
those two hooks on the instance; the hooks of its class still run.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, field
from typing import Any

import torch
from lightning import LightningModule
from lightning.pytorch.plugins.precision import DoublePrecision
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

from actprune.core import settings
from actprune.core.copied import mirrored_record
from actprune.core.errors import ConfigError
from actprune.core.record import SurgeryRecord, carry, parts_of, record_of
from actprune.surgery import apply_record
from actprune.surgery.tensors import follow_hooks
from actprune.training.copies import copies_of, copies_within, inside
from actprune.training.references import followed

KEY = "actprune"
"""Where a Lightning checkpoint carries the surgery records: path of a network -> its record."""
KNOWN = "actprune_known"
"""And what rehearsals found out: path of a network -> see ``Pruner.known``."""
ORDER = "actprune_order"
"""And names of the parameters in the groups of every optimizer, where compensation gave biases."""


class CheckpointHooks:
    """The two checkpoint hooks of one LightningModule, wrapped.

    Args:
        task: the LightningModule whose hooks are wrapped.
    """

    def __init__(self, task: LightningModule) -> None:
        self.task = task
        self.paths: list[str] = []
        """Dotted names of the pruned networks in the LightningModule."""
        self.copies: dict[str, str] = {}
        """Dotted name of a copy -> of what it is a copy, as the user said."""
        self.known: dict[str, dict[str, Any]] = {}
        """Path -> what the rehearsal of that network found out; a resumed run does not rehearse the cut one."""
        self._shapes: dict[str, Shapes] = {}
        self._types: list[list[dict[str, torch.dtype]]] = []
        self._order: list[list[list[str]]] = []
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

    def records(self) -> dict[str, SurgeryRecord]:
        """Path -> record of every network that has been cut."""
        found = {path: record_of(self.task.get_submodule(path)) for path in self.paths}
        return {path: record for path, record in found.items() if record}

    def remember_original(self) -> None:
        """Note the shapes of networks that have not been cut yet, so that earlier checkpoints can be loaded later."""
        for path in self.paths:
            network = self.task.get_submodule(path)
            if not record_of(network):
                self._shapes[path] = Shapes.of(network, inside(self.task.state_dict(), path).keys())

    def save(self, checkpoint: dict[str, Any]) -> None:
        """Put the surgery records into a checkpoint."""
        records = self.records()
        if records:
            checkpoint[KEY] = {path: record.to_dict() for path, record in records.items()}
        if self.known:
            checkpoint[KNOWN] = copy.deepcopy(self.known)
        if any(record.biases for record in records.values()) and self.task._trainer is not None:
            names = {id(parameter): name for name, parameter in self.task.named_parameters()}
            checkpoint[ORDER] = [
                [[names.get(id(p), "") for p in group["params"]] for group in optimizer.param_groups]
                for optimizer in self.task._trainer.optimizers
            ]
        self._after_save(checkpoint)

    def load(self, checkpoint: dict[str, Any]) -> None:
        """Give the networks the shapes of a checkpoint, before its weights are loaded.

        Raises:
            ConfigError: a network is cut already, otherwise than the checkpoint, and its original shapes are unknown; or the
                checkpoint is of a module with other attributes.
        """
        present = dict(self.task.named_modules())
        if unknown := [path for path in checkpoint.get(KEY, {}) if path not in present]:
            raise ConfigError(
                f"the checkpoint holds a pruned network {unknown[0]!r}, which {type(self.task).__name__} does not have; "
                "name the attribute as it was when the checkpoint was written, or rename it in the checkpoint's state_dict "
                f"and in its {KEY!r}"
            )
        records = {path: SurgeryRecord.from_dict(record) for path, record in checkpoint.get(KEY, {}).items()}
        saved = {
            name: list(value.shape) for name, value in checkpoint.get("state_dict", {}).items() if isinstance(value, Tensor)
        }
        for path, record in records.items():
            _materialize(present[path], inside(saved, path) | record.shapes)
        with followed(self.task):
            self.reshape(records)
        self.known = dict(checkpoint.get(KNOWN, {}))
        self._order = checkpoint.get(ORDER, [])
        self._types = [_types(state) for state in checkpoint.get("optimizer_states", [])]
        trainer = self.task._trainer
        if trainer is not None and isinstance(trainer.precision_plugin, DoublePrecision):
            self.task.double()  # Lightning does so after loading, by which time the weights have been rounded to float32
        self._after_load(checkpoint)

    def give_saved_order(self, optimizers: Iterable[Optimizer]) -> None:
        """Let fresh optimizers hold their parameters in the order of the checkpoint, by which state is loaded next.

        A bias that compensation gave is the last in the group of its weight; ``configure_optimizers`` meets it elsewhere.
        """
        parameters = dict(self.task.named_parameters())
        for optimizer, groups in zip(optimizers, self._order, strict=False):
            held = {id(p) for group in optimizer.param_groups for p in group["params"]}
            wanted = [[parameters[name] for name in names if name in parameters] for names in groups]
            if len(wanted) == len(optimizer.param_groups) and {id(p) for group in wanted for p in group} == held:
                for group, ordered in zip(optimizer.param_groups, wanted, strict=True):
                    group["params"][:] = ordered
        self._order = []

    def give_saved_types(self, optimizers: Iterable[Optimizer]) -> None:
        """Give loaded numbers of optimizers the types they were saved with: torch loads them in those of the parameters."""
        for optimizer, types in zip(optimizers, self._types, strict=False):
            parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
            for parameter, wanted in zip(parameters, types, strict=False):
                state = optimizer.state.get(parameter, {})
                state.update({key: state[key].to(kind) for key, kind in wanted.items() if key in state})
        self._types = []

    def reshape(self, wanted: Mapping[str, SurgeryRecord]) -> None:
        """Give networks and their copies the shapes of records; those without a record get their original shape.

        Raises:
            ConfigError: a network is cut already, otherwise than wanted, and its original shapes are unknown.
        """
        self.paths = list(dict.fromkeys([*self.paths, *wanted]))
        self.remember_original()
        for path in self.paths:
            network, shapes = self.task.get_submodule(path), self._shapes.get(path)
            within = copies_within(self.task, path, self.copies)
            record = mirrored_record(wanted.get(path, SurgeryRecord()), network, within)
            self._become(network, record, shapes)
            for twin in copies_of(self.task, path, self.copies):
                self._become(twin.module, twin.of_record(record), None if shapes is None else shapes.inside(twin.part))

    def _become(self, network: nn.Module, wanted: SurgeryRecord, shapes: Shapes | None) -> None:
        present = record_of(network)
        if present.removed == wanted.removed:
            return
        if present:
            if shapes is None:
                raise ConfigError(
                    f"{type(self.task).__name__} is pruned already and the checkpoint holds another shape; "
                    "load the checkpoint into a module of the original shape"
                )
            shapes.restore(network, present)
            carry(network, None)
        if wanted:
            apply_record(network, wanted)


def _types(saved: Mapping[str, Any]) -> list[dict[str, torch.dtype]]:
    """Of a saved optimizer's parameters, in their order: key -> type of what is one number (NAdam's ``mu_product``)."""
    numbers = [number for group in saved["param_groups"] for number in group["params"]]
    states = [saved["state"].get(number, {}) for number in numbers]
    return [
        {key: value.dtype for key, value in state.items() if isinstance(value, Tensor) and not value.dim()} for state in states
    ]


@dataclass(frozen=True)
class Shapes:
    """The shapes of a network: every tensor's, and every number in an attribute of its modules."""

    tensors: dict[str, dict[str, torch.Size]]
    """Module name -> parameter or buffer name -> shape."""
    attributes: dict[str, dict[str, Any]]
    """Module name -> attribute name -> int, or tuple or list of ints."""
    constants: dict[str, dict[str, Tensor]]
    """Module name -> name -> value, of the buffers that no state dict holds and of tensors that are plain attributes."""
    records: dict[str, SurgeryRecord]
    """Module name -> record, of parts that were pruned by themselves."""
    settings: dict[str, dict[str, Any]]
    """Module name -> attribute name -> the object that keeps its settings; a cut gives the module another one."""
    unsaved: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    """Module name -> name -> value on the CPU, of the parameters that ``state_dict`` leaves out, a frozen backbone's say."""

    @classmethod
    def of(cls, network: nn.Module, saved: Set[str] | None = None) -> Shapes:
        """Note the shapes of a network, and the parameters that are not among the saved ones; None: all are."""
        tensors, attributes, constants, kept, left_out = {}, {}, {}, {}, {}
        for name, module in network.named_modules():
            held = {**module._parameters, **module._buffers}
            tensors[name] = {key: value.shape for key, value in held.items() if value is not None}
            outside = {key: module._buffers.get(key) for key in module._non_persistent_buffers_set}
            constants[name] = {key: value.detach().clone() for key, value in outside.items() if value is not None}
            # no copies: a cut replaces them, and data may be kept so
            constants[name] |= {key: value.detach() for key, value in vars(module).items() if isinstance(value, Tensor)}
            attributes[name] = {
                key: type(value)(value) for key, value in vars(module).items() if _is_size(value) and key != "training"
            }
            kept[name] = dict(settings.held(module))
            left_out[name] = {
                key: value.detach().to("cpu", copy=True)
                for key, value in module._parameters.items()
                if value is not None and saved is not None and (f"{name}.{key}" if name else key) not in saved
            }
        return cls(tensors, attributes, constants, parts_of(network), kept, left_out)

    def inside(self, part: str) -> Shapes:
        """The shapes of a part of the network."""
        tensors, attributes = inside(self.tensors, part), inside(self.attributes, part)
        constants, records = inside(self.constants, part), inside(self.records, part)
        return Shapes(tensors, attributes, constants, records, inside(self.settings, part), inside(self.unsaved, part))

    def restore(self, network: nn.Module, record: SurgeryRecord) -> None:
        """Give a cut network its original shapes again; what changes holds nothing until weights are loaded."""
        for name, before in self.records.items():
            carry(network.get_submodule(name), before)
        made: dict[int, nn.Parameter] = {}  # a tied parameter stays tied
        for name, module in network.named_modules():
            if name not in self.tensors:  # a metric that came later
                continue
            # all numbers of a layer of PyTorch are sizes; a user's may be counters
            own = type(module).__module__.startswith("torch.nn.") or isinstance(module, nn.MultiheadAttention)
            for key, value in self.attributes[name].items():
                if own or key in record.attributes.get(name, ()):
                    setattr(module, key, type(value)(value))
            for key in {key.partition(".")[0] for key in record.attributes.get(name, ()) if "." in key}:
                for attribute, value in settings.following(module, key, self.settings[name][key]).items():
                    setattr(module, attribute, value)
            known, constants = self.tensors[name], self.constants[name]
            for key, value in constants.items():
                present = vars(module).get(key)  # None, or of another shape, if a forward writes it: then it was not cut
                if isinstance(present, Tensor) and (f"{name}.{key}" if name else key) in record.removed:
                    setattr(module, key, value.to(present.device, copy=True))
            for key, value in [*module._parameters.items(), *module._buffers.items()]:
                if value is None:
                    continue
                if key not in known:  # a bias that compensation gave
                    module._parameters[key] = None
                    continue
                shape, unsaved = known[key], self.unsaved.get(name, {}).get(key)
                if value.shape == shape:
                    if unsaved is not None:  # compensation may have changed it
                        value.data.copy_(unsaved)
                    continue
                if key in module._buffers:
                    kept = constants.get(key)
                    module._buffers[key] = value.new_zeros(shape) if kept is None else kept.to(value.device, copy=True)
                    continue
                if id(value) not in made:
                    made[id(value)] = nn.Parameter(value.new_zeros(shape), requires_grad=value.requires_grad)
                    if unsaved is not None:
                        made[id(value)].data.copy_(unsaved)
                    follow_hooks(value, made[id(value)])
                module._parameters[key] = made[id(value)]


def _is_size(value: Any) -> bool:
    if isinstance(value, (tuple, list)) and type(value) in (tuple, list):
        return bool(value) and all(type(item) is int for item in value)
    return type(value) is int


def _materialize(network: nn.Module, shapes: Mapping[str, Sequence[int]]) -> None:
    """Give parameters and buffers of lazy layers the shapes that they had before the first cut."""
    for name, tensor in (*network.named_parameters(), *network.named_buffers()):
        if is_lazy(tensor) and name in shapes:
            tensor.materialize(tuple(shapes[name]))  # type: ignore[union-attr]
