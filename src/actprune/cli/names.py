"""What a job and its sweep are called, from what Hydra knows of them."""

from __future__ import annotations

from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode


def choice(group: str) -> str | None:
    """The file chosen in a folder of the configuration, e.g. ``entropy`` for ``pruner``; None outside a Hydra job."""
    return HydraConfig.get().runtime.choices.get(group) if HydraConfig.initialized() else None


def describe_run() -> str | None:
    """Data, model, criterion and job number; None outside a Hydra job."""
    if not HydraConfig.initialized():
        return None
    parts = [choice(group) for group in ("data", "model", "pruner")]
    if HydraConfig.get().mode is RunMode.MULTIRUN:
        parts.append(str(HydraConfig.get().job.num))
    return "-".join(part for part in parts if part)


def sweep_name() -> str | None:
    """Name of the sweep's folder; None for a single job."""
    if not HydraConfig.initialized() or HydraConfig.get().mode is not RunMode.MULTIRUN:
        return None
    return Path(HydraConfig.get().sweep.dir).name
