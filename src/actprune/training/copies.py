"""Averaged copies of a network (EMA, SWA, momentum encoders) take every cut that the network takes.

An average is a module of the same structure whose values come from the network's: one that lost other units, or none, could no
longer be averaged with it. Found by themselves: whatever a callback holds of the LightningModule (``WeightAveraging``,
``EMAWeightAveraging``, ``StochasticWeightAveraging`` and their like), and every ``AveragedModel`` inside the LightningModule.
A momentum encoder looks like any second network, so it is named: ``copies={"encoder_k": "encoder_q"}``.

A copy inside the pruned network is cut by the same plan as its original, and is no part of what is counted and observed; one
outside follows the network's cut. Where validation runs the average alone, the average is observed and the other follows.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any, TypeVar

from lightning import LightningModule
from torch import nn
from torch.optim import Optimizer
from torch.optim.swa_utils import AveragedModel

from actprune.core.copied import Copies, led_by, lies_in, resolved
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
    return {name[len(part) + 1 :]: value for name, value in named.items() if lies_in(name, part)}


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
    outside = {copy: of for copy, of in _seen_from(task, path, pairs(task, named)).items() if not lies_in(copy, path)}
    network, found = task.get_submodule(path), []
    for root in (task, *map(_unwrapped, holders(task))):  # an average of the whole holds averages of its own
        if root is not task:
            found.append(Copy(root.get_submodule(path)))
        for follows, leads in outside.items():
            module, source = root.get_submodule(follows), task.get_submodule(leads)
            if (held := _name_in(source, network)) is not None:
                found.append(Copy(module.get_submodule(held)))
            elif (part := _name_in(network, source)) is not None:
                found.append(Copy(module, part))
    return found


def copies_within(task: LightningModule, path: str, named: Mapping[str, str]) -> Copies:
    """The copies inside the network at ``path`` of what is inside it too, by their names in it; arguments as ``copies_of``.

    Raises:
        ConfigError: it cannot be told what an ``AveragedModel`` averages.
    """
    found = _seen_from(task, path, pairs(task, named)).items()
    both = [pair for pair in found if all(lies_in(one, path) for one in pair)]
    return {copy[len(path) :].lstrip("."): source[len(path) :].lstrip(".") for copy, source in both}


def pairs(task: LightningModule, named: Mapping[str, str]) -> Copies:
    """Dotted name of every copy inside the LightningModule -> of its original; of an ``AveragedModel``, of what it holds.

    Raises:
        ConfigError: it cannot be told what an ``AveragedModel`` averages, or copies are those of one another.
    """
    return resolved(dict(_within(task, named)))


def check_apart(task: LightningModule, paths: Collection[str], named: Mapping[str, str]) -> None:
    """Refuse to prune a copy and its original as two networks: each would take the cuts of both.

    Raises:
        ConfigError: names them.
    """
    for alike in _alike(pairs(task, named)):
        met = {path: [one for one in alike if holds(task, path, one) or holds(task, one, path)] for path in paths}
        (first, ones), *others = [item for item in met.items() if item[1]] or [("", [])]
        for path, theirs in others:
            if theirs != ones:
                raise ConfigError(
                    f"modules names {first!r} and {path!r}, but {ones[0]} and {theirs[0]} are copies of one another and take "
                    "each other's cuts; name one of the two"
                )


def holds(task: LightningModule, path: str, name: str) -> bool:
    """Whether the module ``name`` is the one at ``path`` or lies in it, under that name or another."""
    return _name_in(task.get_submodule(path), task.get_submodule(name)) is not None


def _name_in(holder: nn.Module, module: nn.Module) -> str | None:
    return next((name for name, part in holder.named_modules() if part is module), None)


def _seen_from(task: LightningModule, path: str, copies: Copies) -> Copies:
    """The same copies, by their names in the network at ``path`` where they have one, which need not be their first.

    Where the network is or holds a copy but not its original, the others follow that copy.
    """
    within = {id(part): f"{path}.{name}".strip(".") for name, part in task.get_submodule(path).named_modules()}
    known = {name: within.get(id(task.get_submodule(name)), name) for pair in copies.items() for name in pair}
    copies = {known[copy]: known[source] for copy, source in copies.items()}
    return led_by({path, *(name for name in known.values() if lies_in(name, path))}, copies)


def stand_ins(task: LightningModule, path: str, named: Mapping[str, str]) -> list[str]:
    """Dotted names of what may run in place of the network at ``path``: copies of it, or what it is a copy of.

    Raises:
        ConfigError: it cannot be told what an ``AveragedModel`` averages.
    """
    for alike in _alike(pairs(task, named)):
        for mine in (one for one in alike if lies_in(path, one) or one == f"{path}.module"):
            return [_outermost(task, one + path[len(mine) :]) for one in alike if one != mine]
    return []


def _alike(copies: Copies) -> Iterator[list[str]]:
    """Every original, followed by its copies."""
    for source in dict.fromkeys(copies.values()):
        yield [source, *(copy for copy, of in copies.items() if of == source)]


def _outermost(task: LightningModule, path: str) -> str:
    outer = path.removesuffix(".module")
    return outer if isinstance(task.get_submodule(outer), AveragedModel) else path


def check_copies(task: LightningModule, named: Mapping[str, str]) -> None:
    """Refuse names that do not exist, or modules that are no copies.

    Raises:
        ConfigError: says which.
    """
    for name, original in named.items():
        for wanted in (name, original):
            submodule(task, wanted, "copies")
            if not wanted:
                raise ConfigError(
                    f"copies={{{name!r}: {original!r}}}: '' is all of {type(task).__name__}, which holds copy and original; "
                    "name networks in it"
                )
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


def _within(task: LightningModule, named: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    for pair in named.items():
        copy, source = (f"{name}.module" if isinstance(task.get_submodule(name), AveragedModel) else name for name in pair)
        yield copy, source
    known = {*named, *named.values()}
    for name, module in task.named_modules():
        if isinstance(module, AveragedModel) and not {name, f"{name}.module"} & known:
            averaged = _averaged(task, name, module.module, named)
            if averaged is not None:
                yield f"{name}.module", averaged


def _averaged(task: LightningModule, name: str, copy: nn.Module, named: Mapping[str, str]) -> str | None:
    """Dotted name of what an ``AveragedModel`` inside the LightningModule averages; None: nothing in it."""
    names = [n for n, _ in copy.named_parameters()]
    others = [*named, *(path for path, module in task.named_modules() if isinstance(module, AveragedModel))]
    alike = [
        path
        for path, module in task.named_modules()
        if type(module) is type(copy)
        and not any(lies_in(path, other) for other in others)
        and [n for n, _ in module.named_parameters()] == names
    ]
    if len(alike) > 1:
        raise ConfigError(
            f"{name} is an AveragedModel, and {len(alike)} modules of {type(task).__name__} may be what it averages "
            f"({', '.join(alike)}); say which, e.g. copies={{{name!r}: {alike[0]!r}}}"
        )
    if not alike and type(copy) is type(task):
        raise ConfigError(
            f"{name} averages all of {type(task).__name__}, which holds it, and could not follow a cut; let it average the "
            "network in it, or use the callback EMAWeightAveraging"
        )
    return alike[0] if alike else None


def _unwrapped(value: Any) -> Any:
    return value.module if isinstance(value, AveragedModel) else value
