"""Weights from a file into a freshly made model, whatever wrote the file.

Accepted: a state dict, or a dict that holds one under ``state_dict`` (Lightning checkpoints, most published weights),
with names that may all start with ``module.`` (DataParallel), ``model.`` or ``net.`` (attribute of a LightningModule).
"""

from __future__ import annotations

import os
import pickle
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from actprune.core.errors import ConfigError

PREFIXES = ("module.", "model.", "net.")
SHOWN = 5


def load_weights(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Load the weights at ``path`` into ``model``; all of them or none.

    Only tensors are read (``weights_only=True``): a file from the network cannot run code.

    Raises:
        ConfigError: the file is missing, is no weights file, or does not fit; the message lists the names that are
            missing, unexpected or of another shape. The model is as it was.
    """
    file = Path(path)
    state = _without_prefix(_read(file), model)
    own = model.state_dict()
    # Batch norms counted their batches from PyTorch 0.4.1 on; older files (published ones among them) lack the count.
    state |= {name: own[name] for name in own if name.endswith("num_batches_tracked") and name not in state}
    missing = [name for name in own if name not in state]
    unexpected = [name for name in state if name not in own]
    shapes = [
        f"{name} ({tuple(state[name].shape)} in the file, {tuple(tensor.shape)} in the model)"
        for name, tensor in own.items()
        if name in state and state[name].shape != tensor.shape
    ]
    if missing or unexpected or shapes:
        problems = [
            _listed(what, names)
            for what, names in (("missing", missing), ("unexpected", unexpected), ("of another shape", shapes))
            if names
        ]
        raise ConfigError(
            f"weights {file} do not fit {type(model).__name__}: {'; '.join(problems)}. "
            "Choose the model and number of classes they were made for, or weights=null"
        )
    model.load_state_dict(state)


def _read(file: Path) -> dict[str, Tensor]:
    if not file.is_file():
        raise ConfigError(f"weights file {file.resolve()} does not exist; give a path to a state dict, or weights=null")
    try:
        content = torch.load(file, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0].partition(". ")[0]  # torch's advice does not fit
        raise ConfigError(
            f"weights file {file.resolve()} cannot be read as tensors only ({reason}); save model.state_dict() instead"
        ) from error
    if isinstance(content, Mapping) and isinstance(content.get("state_dict"), Mapping):
        content = content["state_dict"]
    if not isinstance(content, Mapping) or not content or not all(isinstance(v, Tensor) for v in content.values()):
        raise ConfigError(f"weights file {file.resolve()} holds no state dict; save model.state_dict() instead")
    return dict(content)


def _without_prefix(state: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Take off the prefixes that every name has, unless the model has such names itself."""
    own = set(model.state_dict())
    while own.isdisjoint(state):
        prefix = next((p for p in PREFIXES if all(name.startswith(p) for name in state)), None)
        if prefix is None:
            break
        state = {name.removeprefix(prefix): tensor for name, tensor in state.items()}
    return state


def _listed(what: str, names: list[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return f"{len(names)} {what}: {', '.join(names[:SHOWN])}{more}"
