"""The surgery record: the history of plans as plain lists and strings; with it a fresh model takes the pruned shape."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

from torch import nn

from actprune.core.errors import ConfigError
from actprune.core.plan import Plan, Positions
from actprune.core.wrappers import unwrapped

ATTRIBUTE = "_surgery_record"
"""Name under which a pruned model carries its record."""


@dataclass
class SurgeryRecord:
    """Everything that was removed from a model, in positions of the original tensors."""

    removed: Positions = field(default_factory=dict)
    """Parameter or buffer name -> dimension -> sorted positions of the original tensor."""
    shapes: dict[str, list[int]] = field(default_factory=dict)
    """Original shape of every tensor in ``removed``."""
    attributes: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Module path -> attribute -> value now."""
    biases: list[str] = field(default_factory=list)
    """Paths of modules that were given a bias."""
    widths: dict[str, list[int]] = field(default_factory=dict)
    """Group name -> [original width, width now] of every group that was cut."""
    steps: list[dict[str, Any]] = field(default_factory=list)
    """One summary per executed plan: params and macs before and after, units removed per group."""

    def extend(self, plan: Plan, shapes: Mapping[str, tuple[int, ...]], sizes: Mapping[str, int]) -> None:
        """Append an executed plan.

        Args:
            plan: the plan, in positions of the tensors before it.
            shapes: shapes before the plan, of every tensor it cuts.
            sizes: widths before the plan, of every group it cuts.
        """
        self._remove(plan.removed, shapes, plan.attributes, plan.new_biases)
        for group, n in plan.groups.items():
            before = self.widths.setdefault(group, [sizes[group], sizes[group]])
            before[1] -= n
        self.steps.append(
            {
                "params_before": plan.params_before,
                "params_after": plan.params_after,
                "macs_before": plan.macs_before,
                "macs_after": plan.macs_after,
                "groups": dict(plan.groups),
            }
        )

    def absorb(self, path: str, part: SurgeryRecord) -> None:
        """Take over what was removed from a part by itself, last; budgets and widths of the whole do not count it."""
        inside = f"{path}.".__add__
        self._remove(
            {inside(name): dims for name, dims in part.removed.items()},
            {inside(name): shape for name, shape in part.shapes.items()},
            {inside(name).rstrip("."): values for name, values in part.attributes.items()},
            [inside(name).rstrip(".") for name in part.biases],
        )

    def beyond(self, earlier: SurgeryRecord) -> Positions | None:
        """What was removed after ``earlier``, in positions of what it left; None if this record does not go on from there."""
        found: dict[str, dict[int, list[int]]] = {}
        if not earlier.removed.keys() <= self.removed.keys():
            return None
        for name, dims in self.removed.items():
            gone = earlier.removed.get(name, {})
            if not gone.keys() <= dims.keys() or self.shapes[name] != earlier.shapes.get(name, self.shapes[name]):
                return None
            for dim, positions in dims.items():
                before = gone.get(dim, [])
                if not set(before) <= set(positions):
                    return None
                if rest := since(positions, before):
                    found.setdefault(name, {})[dim] = rest
        return found

    def _remove(
        self,
        removed: Positions,
        shapes: Mapping[str, Sequence[int]],
        attributes: Mapping[str, Mapping[str, Any]],
        biases: Iterable[str],
    ) -> None:
        given = {f"{path}.bias" if path else "bias" for path in self.biases}  # these have no original; they follow the weight
        for name, dims in removed.items():
            if name in given:
                continue
            known = self.removed.setdefault(name, {})
            original = self.shapes.setdefault(name, list(shapes[name]))
            for dim, positions in dims.items():
                gone = set(known.get(dim, ()))
                kept = [i for i in range(original[dim]) if i not in gone]
                known[dim] = sorted(gone | {kept[i] for i in positions})
        for path, values in attributes.items():
            self.attributes.setdefault(path, {}).update(values)
        self.biases += [path for path in biases if path not in self.biases]

    def to_dict(self) -> dict[str, Any]:
        """Plain dicts, lists, numbers and strings; dimensions become strings, so that JSON keeps them."""
        return {
            "removed": {n: {str(d): list(p) for d, p in dims.items()} for n, dims in self.removed.items()},
            "shapes": {name: list(shape) for name, shape in self.shapes.items()},
            "attributes": {path: dict(values) for path, values in self.attributes.items()},
            "biases": list(self.biases),
            "widths": {name: list(pair) for name, pair in self.widths.items()},
            "steps": [dict(step) for step in self.steps],
        }

    @classmethod
    def from_dict(cls, state: Mapping[str, Any]) -> SurgeryRecord:
        """Inverse of ``to_dict``.

        Raises:
            ConfigError: the dictionary is not a surgery record.
        """
        missing = {"removed", "shapes", "attributes", "biases", "widths", "steps"} - set(state)
        if missing:
            raise ConfigError(f"not a surgery record: {', '.join(sorted(missing))} missing; pass what to_dict() returned")
        return cls(
            removed={n: {int(d): list(p) for d, p in dims.items()} for n, dims in state["removed"].items()},
            shapes={name: list(shape) for name, shape in state["shapes"].items()},
            attributes={path: dict(values) for path, values in state["attributes"].items()},
            biases=list(state["biases"]),
            widths={name: list(pair) for name, pair in state["widths"].items()},
            steps=[dict(step) for step in state["steps"]],
        )

    def macs_before(self, macs: int) -> int:
        """Multiply-adds before any pruning of a call that takes ``macs`` now.

        What every step left of its own example's: exact for that example and for batches of another size, in proportion for
        an example of another resolution, which may weigh layers differently.
        """
        whole = Fraction(macs)
        for step in self.steps:
            whole *= Fraction(step["macs_before"], step["macs_after"]) if step["macs_after"] else 1
        return round(whole)

    def __bool__(self) -> bool:
        """Whether anything was removed."""
        return bool(self.removed)


def since(gone: Sequence[int], before: Sequence[int]) -> list[int]:
    """What left after ``before``, in positions of what stayed then."""
    ordered, known = sorted(before), set(before)
    return [place - bisect_left(ordered, place) for place in gone if place not in known]


def record_of(model: nn.Module) -> SurgeryRecord:
    """The record that a model carries, or the module inside a wrapper; an empty one where it was never pruned."""
    return getattr(unwrapped(model), ATTRIBUTE, None) or SurgeryRecord()


def carry(model: nn.Module, record: SurgeryRecord | None) -> None:
    """Let a model carry a record, which holds those of its parts too, or none; of a wrapper it is the module inside."""
    inside = unwrapped(model)
    if record is not None:
        for path in parts_of(inside):
            carry(inside.get_submodule(path), None)
        setattr(inside, ATTRIBUTE, record)
    elif ATTRIBUTE in vars(inside):
        delattr(inside, ATTRIBUTE)


def parts_of(model: nn.Module) -> dict[str, SurgeryRecord]:
    """Path -> record of every part that was pruned by itself, outer parts first."""
    named = unwrapped(model).named_modules()
    return {path: record for path, module in named if path and (record := vars(module).get(ATTRIBUTE))}


def whole_record(model: nn.Module) -> SurgeryRecord:
    """A copy of the record that a model carries, with those of its parts."""
    record = SurgeryRecord.from_dict(record_of(model).to_dict())
    for path, part in parts_of(model).items():
        record.absorb(path, part)
    return record
