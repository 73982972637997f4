"""Criteria by the name of their file in ``conf/pruner``."""

from __future__ import annotations

from typing import Any

from hydra.core.global_hydra import GlobalHydra
from hydra.core.object_type import ObjectType
from omegaconf import DictConfig, OmegaConf

from actprune.cli.build import build, resolved
from actprune.core.errors import ConfigError
from actprune.core.views import Criterion


def all_criteria() -> list[str]:
    """Every file of the pruner folder that holds a criterion."""
    names = GlobalHydra.instance().config_loader().get_group_options("pruner", ObjectType.CONFIG)
    return [name for name in names if not name.startswith("_") and "criterion" in _file(name)]


def criterion_named(name: str, config: DictConfig, key: str) -> Criterion:
    """The criterion of a file of ``conf/pruner``, with the settings that the configuration gives it.

    Raises:
        ConfigError: there is no such file, or it has no criterion; the message begins with ``key``, where it was asked for.
    """
    if name not in GlobalHydra.instance().config_loader().get_group_options("pruner", ObjectType.CONFIG):
        raise ConfigError(f"{key}: there is no pruner={name}; choose from {', '.join(all_criteria())}")
    node = _file(name).get("criterion")
    if node is None:
        raise ConfigError(f"{key}: pruner={name} has no criterion; choose from {', '.join(all_criteria())}")
    # what the file takes from other places of the configuration is found there
    known: Any = OmegaConf.to_container(config, enum_to_str=True)
    whole = OmegaConf.create({**known, "asked": node})
    return build(resolved(whole).asked, f"pruner.{name}.criterion")


def _file(name: str) -> DictConfig:
    """A file of the pruner folder as it is written, wherever on Hydra's search path."""
    found = GlobalHydra.instance().config_loader().repository.load_config(f"pruner/{name}")  # type: ignore[attr-defined]
    return found.config
