"""Give a fresh model the pruned shape, and files that hold a pruned model: state dict and surgery record."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch import nn

from actprune.core.errors import ConfigError, SurgeryError
from actprune.core.files import atomic_path
from actprune.core.plan import Plan
from actprune.core.record import ATTRIBUTE, SurgeryRecord, record_of
from actprune.surgery.cut import cut, rehearsed
from actprune.surgery.tensors import lookup

_FORMAT = "actprune.pruned.v1"


def apply_record(model: nn.Module, record: SurgeryRecord) -> nn.Module:
    """Cut a fresh model of the original shape as ``record`` says, in place; its values stay what they are.

    Args:
        model: a model of the original architecture, not pruned.
        record: what ``prune`` returned, or ``SurgeryRecord.from_dict`` of a file.

    Returns:
        The same model, which now carries the record.

    Raises:
        SurgeryError: the model does not have the tensors or the original shapes that the record names.
    """
    cut(model, _plan(model, record))
    setattr(model, ATTRIBUTE, SurgeryRecord.from_dict(record.to_dict()))
    return model


def _plan(model: nn.Module, record: SurgeryRecord) -> Plan:
    """Everything that a record says, as one plan for a fresh model."""
    if record_of(model):
        raise SurgeryError("the model is pruned already; apply a record to a fresh model of the original shape")
    for name, shape in record.shapes.items():
        found = list(lookup(model, name).shape)
        if found != shape:
            raise SurgeryError(
                f"{name} has shape {tuple(found)}, the record was made on {tuple(shape)}; "
                "build the model with the settings it was pruned with"
            )
    biases = {}
    for path in record.biases:
        module = model.get_submodule(path)
        weight = lookup(model, f"{path}.weight" if path else "weight")
        biases[path] = torch.zeros(int(getattr(module, "out_channels", weight.shape[0])))  # type: ignore[arg-type]
    return Plan(
        removed=record.removed,
        groups={},
        attributes=record.attributes,
        params_before=0,
        params_after=0,
        macs_before=0,
        macs_after=0,
        new_biases=biases,
    )


def save_pruned(model: nn.Module, path: str | os.PathLike[str]) -> Path:
    """Write the state dict and the surgery record that the model carries; the file is whole or absent.

    Raises:
        OSError: the folder cannot be written.
    """
    with atomic_path(path) as temporary:
        content = {"format": _FORMAT, "state_dict": model.state_dict(), "surgery_record": record_of(model).to_dict()}
        torch.save(content, temporary)
    return Path(path)


def load_pruned(fresh_model: nn.Module, path: str | os.PathLike[str]) -> nn.Module:
    """Cut a fresh model as the file says and load its values, in place (``weights_only=True``).

    Raises:
        ConfigError: the file is not one that ``save_pruned`` wrote.
        SurgeryError: the model is not of the original architecture; it is as it was.
    """
    device = next((p.device for p in fresh_model.parameters()), torch.device("cpu"))
    content: Any = torch.load(path, map_location=device, weights_only=True)
    if not isinstance(content, dict) or content.get("format") != _FORMAT:
        raise ConfigError(f"{path} was not written by save_pruned; pass its state dict to load_state_dict instead")
    record = SurgeryRecord.from_dict(content["surgery_record"])
    with rehearsed(fresh_model, _plan(fresh_model, record)):
        ours, theirs = _shapes(fresh_model.state_dict()), _shapes(content["state_dict"])
    differing = [name for name in {**ours, **theirs} if ours.get(name) != theirs.get(name)]
    if differing:
        name = differing[0]
        raise SurgeryError(
            f"{path} holds another architecture than {type(fresh_model).__name__}: {len(differing)} tensors differ, {name} is "
            f"{theirs.get(name, 'absent')} there and {ours.get(name, 'absent')} here; build the model with the settings it was "
            "pruned with"
        )
    apply_record(fresh_model, record)
    fresh_model.load_state_dict(content["state_dict"])
    return fresh_model


def _shapes(state: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(getattr(value, "shape", ())) for name, value in state.items()}
