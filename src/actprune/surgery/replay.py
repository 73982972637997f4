"""Give a fresh model the pruned shape, and files that hold a pruned model: state dict and surgery record."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.utils import consume_prefix_in_state_dict_if_present

from actprune.core.errors import ConfigError, SurgeryError
from actprune.core.files import atomic_path
from actprune.core.plan import Plan
from actprune.core.record import SurgeryRecord, carry, record_of, whole_record
from actprune.core.wrappers import PREFIXES, unwrapped
from actprune.surgery.cut import cut, rehearsed
from actprune.surgery.tensors import lookup

_FORMAT = "actprune.pruned.v1"


def apply_record(model: nn.Module, record: SurgeryRecord) -> nn.Module:
    """Cut a fresh model of the original shape as ``record`` says, in place; its values stay what they are.

    Args:
        model: a model of the original architecture, not pruned; compiled or wrapped for several devices, or not.
        record: what ``prune`` returned, or ``SurgeryRecord.from_dict`` of a file.

    Returns:
        The same model, which now carries the record.

    Raises:
        SurgeryError: the model does not have the tensors or the original shapes that the record names. Parts that were pruned
            before the model was may be so already.
        ConfigError: ``record`` is none.
    """
    if not isinstance(record, SurgeryRecord):
        raise ConfigError(
            f"record is of type {type(record).__name__}; pass what prune returned, or SurgeryRecord.from_dict(dictionary)"
        )
    named_alike = any(p[:-1] in model._modules and all(name.startswith(p) for name in record.shapes) for p in PREFIXES)
    part = model if named_alike else unwrapped(model)
    record = _as_inside(part, record)
    cut(part, _plan(part, record))
    carry(part, record)
    return model


def _as_inside(inside: nn.Module, record: SurgeryRecord) -> SurgeryRecord:
    """A copy of the record with names of the module inside a wrapper, where it was made of the wrapper."""
    state = record.to_dict()
    prefix = _foreign_prefix(inside, state["shapes"])
    for key in ("removed", "shapes", "attributes", "widths"):
        state[key] = {name.removeprefix(prefix): value for name, value in state[key].items()}
    state["biases"] = [path.removeprefix(prefix) for path in state["biases"]]
    return SurgeryRecord.from_dict(state)


def _foreign_prefix(inside: nn.Module, names: Iterable[str]) -> str:
    """What wrappers put before all of these names, if the module inside has no such children; else nothing."""
    foreign, found = [p for p in PREFIXES if p[:-1] not in inside._modules], ""
    while names and (outer := next((p for p in foreign if all(n.startswith(found + p) for n in names)), "")):
        found += outer
    return found


def _plan(model: nn.Module, record: SurgeryRecord) -> Plan:
    """Everything that a record says, as one plan for a fresh model."""
    if record_of(model):
        raise SurgeryError("the model is pruned already; apply a record to a fresh model of the original shape")
    removed, done = record.removed, whole_record(model)
    if done and (rest := record.beyond(done)) is not None:
        removed, record = (
            rest,
            dataclasses.replace(record, shapes={}, biases=[p for p in record.biases if p not in done.biases]),
        )
        for path in done.biases:  # which no record knows the original of: they follow the weight
            transposed = isinstance(model.get_submodule(path), nn.modules.conv._ConvTransposeNd)
            if gone := removed.get(f"{path}.weight", {}).get(int(transposed)):
                removed[f"{path}.bias"] = {0: gone}
    unset = {name for name in record.shapes if _is_unset(model, name)}
    removed = {name: dims for name, dims in removed.items() if name not in unset}
    for name, shape in record.shapes.items():
        if name in unset:
            continue
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
        biases[path] = torch.zeros(int(getattr(module, "out_channels", weight.shape[0])), device="cpu")  # type: ignore[arg-type]
    return Plan(
        removed=removed,
        groups={},
        attributes=record.attributes,
        params_before=0,
        params_after=0,
        macs_before=0,
        macs_after=0,
        new_biases=biases,
    )


def _is_unset(model: nn.Module, name: str) -> bool:
    """Whether a plain attribute is None as yet: a table that the first call computes, from weights that are cut by then."""
    path, _, leaf = name.rpartition(".")
    try:
        held = vars(model.get_submodule(path))
    except AttributeError:
        return False
    return leaf in held and held[leaf] is None


def save_pruned(model: nn.Module, path: str | os.PathLike[str]) -> Path:
    """Write the state dict and the surgery record that the model and its parts carry; the file is whole or absent.

    Of a model that is compiled or wrapped for several devices it is the module inside that is written.

    Raises:
        OSError: the folder cannot be written.
    """
    model = unwrapped(model)
    with atomic_path(path) as temporary:
        content = {"format": _FORMAT, "state_dict": model.state_dict(), "surgery_record": whole_record(model).to_dict()}
        with temporary.open("wb") as file:  # PyTorch names what is inside after a path, and finds no name in ``.pruned``
            torch.save(content, file)
    return Path(path)


def load_pruned(fresh_model: nn.Module, path: str | os.PathLike[str]) -> nn.Module:
    """Cut a fresh model as the file says and load its values, in place (``weights_only=True``).

    A model on the meta device takes the file's tensors, on the CPU.

    Raises:
        ConfigError: the file is not one that ``save_pruned`` wrote.
        SurgeryError: the model is not of the original architecture; it is as it was.
    """
    inside = unwrapped(fresh_model)
    content, holds = _read(inside, path)
    record = _as_inside(inside, SurgeryRecord.from_dict(content["surgery_record"]))
    if prefix := _foreign_prefix(inside, holds):
        consume_prefix_in_state_dict_if_present(holds, prefix)
    with rehearsed(inside, _plan(inside, record)):
        ours, theirs = _shapes(inside.state_dict()), _shapes(holds)
    differing = [name for name in {**ours, **theirs} if ours.get(name) != theirs.get(name)]
    if differing:
        name = differing[0]
        raise SurgeryError(
            f"{path} holds another architecture than {type(inside).__name__}: {len(differing)} tensors differ, {name} is "
            f"{theirs.get(name, 'absent')} there and {ours.get(name, 'absent')} here; build the model with the settings it was "
            "pruned with"
        )
    empty = next((name for name, tensor in inside.named_buffers() if tensor.is_meta and name not in ours), None)
    if empty is not None:
        raise SurgeryError(f"{empty} is on the meta device and no state dict holds its values; build the model on cpu")
    apply_record(inside, record)
    names: dict[nn.Parameter, list[str]] = {}
    for name, parameter in inside.named_parameters(remove_duplicate=False):
        names.setdefault(parameter, []).append(name)
    held = inside.state_dict().values()  # tensors, and what modules call their extra state
    inside.load_state_dict(holds, assign=any(isinstance(value, Tensor) and value.is_meta for value in held))
    for first, *others in names.values():  # assigned one by one, tied weights would have come apart
        for path, _, leaf in (name.rpartition(".") for name in others):
            setattr(inside.get_submodule(path), leaf, inside.get_parameter(first))
    return fresh_model


def _read(inside: nn.Module, path: str | os.PathLike[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """What ``save_pruned`` wrote, and the state dict in it."""
    device = next((p.device for p in inside.parameters() if not p.is_meta), torch.device("cpu"))
    try:
        content: Any = torch.load(path, map_location=device, weights_only=True)
    except OSError:
        raise
    except Exception as error:  # a whole model that was pickled, or no file of torch's at all: many kinds
        raise ConfigError(
            f"{path} cannot be read ({type(error).__name__}): save_pruned did not write it, or it is damaged; pass a file of "
            "save_pruned"
        ) from error
    found = content.get("format") if isinstance(content, dict) else None
    if isinstance(found, str) and found != _FORMAT and found.startswith(_FORMAT.rpartition(".")[0]):
        raise ConfigError(f"{path} has the format {found}, this actprune reads {_FORMAT}; use the version that wrote it")
    if found != _FORMAT:
        raise ConfigError(f"{path} was not written by save_pruned; pass its state dict to load_state_dict instead")
    return content, content["state_dict"]


def _shapes(state: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(getattr(value, "shape", ())) for name, value in state.items()}
