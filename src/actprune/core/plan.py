"""A plan: which units go now, decided once, the same on every rank, serialisable."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

Positions = dict[str, dict[int, list[int]]]
"""Tensor name -> dimension -> sorted positions."""


@dataclass(frozen=True)
class Plan:
    """What one pruning step does to a model; positions count in the tensors as they are before the step."""

    removed: Positions
    """Parameter or buffer name -> dimension -> sorted positions that leave."""
    groups: Mapping[str, int]
    """Group name -> number of units that leave."""
    attributes: Mapping[str, Mapping[str, Any]]
    """Module path -> attribute -> value after the step."""
    params_before: int
    params_after: int
    """Parameters once the plan is executed, new biases included."""
    macs_before: int
    macs_after: int
    """Multiply-adds once the plan is executed."""
    shifts: Mapping[str, Tensor] = field(default_factory=dict)
    """Parameter or buffer name -> what compensation adds to it, in its shape before the step."""
    new_biases: Mapping[str, Tensor] = field(default_factory=dict)
    """Module path -> values of a bias that compensation gives to a module without one, one per output before the step."""

    def to_dict(self) -> dict[str, Any]:
        """Plain containers, numbers and tensors: loads with ``weights_only=True``."""
        return {
            "removed": {name: {dim: list(p) for dim, p in dims.items()} for name, dims in self.removed.items()},
            "groups": dict(self.groups),
            "attributes": {path: dict(values) for path, values in self.attributes.items()},
            "params_before": self.params_before,
            "params_after": self.params_after,
            "macs_before": self.macs_before,
            "macs_after": self.macs_after,
            "shifts": dict(self.shifts),
            "new_biases": dict(self.new_biases),
        }

    @classmethod
    def from_dict(cls, state: Mapping[str, Any]) -> Plan:
        """Inverse of ``to_dict``."""
        return cls(**state)
