"""Averaged copies of a network (EMA, SWA, momentum encoders) take every cut that the network takes.

An average is a module of the same structure whose values come from the network's: one that lost other units, or none, could no
longer be averaged with it. Found by themselves: whatever a callback holds of the LightningModule (``WeightAveraging``,
``EMAWeightAveraging``, ``StochasticWeightAveraging`` and their like), and every ``AveragedModel`` inside the LightningModule.
A momentum encoder looks like any second network, so it is named: ``copies={"encoder_k": "encoder_q"}``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, TypeVar

from lightning import LightningModule
from torch import nn
from torch.optim import Optimizer
from torch.optim.swa_utils import AveragedModel

from actprune.core.errors import ConfigError
from actprune.core.plan import Plan
from actprune.core.record import SurgeryRecord, carry
from actprune.surgery import cut

Value = TypeVar("Value")


@dataclasses.dataclass(frozen=True)
class Copy:
    """A copy of a pruned network, or of a part of it."""

    module: nn.Module
    """What mirrors it."""
    part: str = ""
    """Dotted name in the network of what is mirrored; empty for all of it."""

    def follow(self, plan: Plan, record: SurgeryRecord, optimizers: Iterable[Optimizer]) -> None:
        """Take the cut that the network has just taken.

        Args:
            plan: what was executed on the network.
            record: the network's record, with the plan in it.
            optimizers: they may train the copy, where validation runs the average and the average is pruned.

        Raises:
            SurgeryError: the copy does not have the network's shapes.
        """
        cut(self.module, self.of_plan(plan), optimizers=optimizers)
        carry(self.module, self.of_record(record))

    def of_plan(self, plan: Plan) -> Plan:
        """What of a plan concerns the part that is mirrored."""
        return dataclasses.replace(
            plan,
            groups={},
            removed=inside(plan.removed, self.part),
            attributes=inside(plan.attributes, self.part),
            shifts=inside(plan.shifts, self.part),
            new_biases=inside(plan.new_biases, self.part),
        )

    def of_record(self, record: SurgeryRecord) -> SurgeryRecord:
        """What of a record concerns the part that is mirrored, as a record of its own."""
        return SurgeryRecord(
            removed=inside(record.removed, self.part),
            shapes=inside(record.shapes, self.part),
            attributes=inside(record.attributes, self.part),
            biases=list(inside(dict.fromkeys(record.biases), self.part)),
        )


def inside(named: Mapping[str, Value], part: str) -> dict[str, Value]:
    """Entries whose dotted name lies in ``part``, under the rest of their name."""
    if not part:
        return dict(named)
    return {name[len(part) + 1 :]: value for name, value in named.items() if name == part or name.startswith(f"{part}.")}


def holders(task: LightningModule) -> list[nn.Module]:
    """What callbacks hold of the LightningModule: copies of it, or an ``AveragedModel`` around one."""
    trainer = task._trainer
    if trainer is None:
        return []
    held = [value for callback in trainer.callbacks for value in vars(callback).values()]  # type: ignore[attr-defined]
    return [value for value in held if value is not task and type(_unwrapped(value)) is type(task)]


def copies_of(task: LightningModule, path: str, named: Mapping[str, str]) -> list[Copy]:
    """Every copy of the network at ``path``.

    Args:
        task: the LightningModule that is trained.
        path: dotted name of the pruned network in it.
        named: dotted name of a copy -> of what it is a copy, as the user said.

    Raises:
        ConfigError: it cannot be told what an ``AveragedModel`` averages.
    """
    found = [(_unwrapped(holder), "") for holder in holders(task)]
    found += list(_within(task, named))
    copies = []
    for module, mirrored in found:
        if mirrored == path or not mirrored or path.startswith(f"{mirrored}."):
            copies.append(Copy(module.get_submodule(path[len(mirrored) :].lstrip("."))))
        elif not path or mirrored.startswith(f"{path}."):
            copies.append(Copy(module, mirrored[len(path) :].lstrip(".")))
    return copies


def check_copies(task: LightningModule, named: Mapping[str, str]) -> None:
    """Refuse names that do not exist, or modules that are no copies.

    Raises:
        ConfigError: says which.
    """
    for name, original in named.items():
        for wanted in (name, original):
            submodule(task, wanted, "copies")
        ours, theirs = (dict(_unwrapped(task.get_submodule(path)).named_parameters()) for path in (name, original))
        if {n: p.shape for n, p in ours.items()} != {n: p.shape for n, p in theirs.items()}:
            raise ConfigError(
                f"copies={{{name!r}: {original!r}}}: {name} does not have the parameters of {original}; a copy has the same "
                "names and shapes"
            )


def submodule(task: LightningModule, path: str, setting: str) -> nn.Module:
    """The submodule of a name that a user gave.

    Raises:
        ConfigError: there is none.
    """
    try:
        return task.get_submodule(path)
    except AttributeError:
        known = ", ".join(name for name, child in task.named_children() if any(True for _ in child.parameters()))
        raise ConfigError(
            f"{setting} names {path!r}, which {type(task).__name__} does not have; it has {known or 'no submodules'} "
            "and what is inside them, with dots"
        ) from None


def _within(task: LightningModule, named: Mapping[str, str]) -> Iterator[tuple[nn.Module, str]]:
    for name, original in named.items():
        yield _unwrapped(task.get_submodule(name)), original
    for name, module in task.named_modules():
        if isinstance(module, AveragedModel) and name not in named:
            yield module.module, _averaged(task, name, module.module)


def _averaged(task: LightningModule, name: str, copy: nn.Module) -> str:
    """Dotted name of what an ``AveragedModel`` inside the LightningModule averages."""
    names = [n for n, _ in copy.named_parameters()]
    alike = [
        path
        for path, module in task.named_modules()
        if type(module) is type(copy) and not path.startswith(name) and [n for n, _ in module.named_parameters()] == names
    ]
    if len(alike) != 1:
        raise ConfigError(
            f"{name} is an AveragedModel, and {len(alike)} modules of {type(task).__name__} may be what it averages "
            f"({', '.join(alike) or 'none'}); say which: copies={{{name!r}: ...}}"
        )
    return alike[0]


def _unwrapped(value: Any) -> Any:
    return value.module if isinstance(value, AveragedModel) else value
