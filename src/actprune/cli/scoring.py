"""Criteria by the name of their file in ``conf/pruner``."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from hydra.core.global_hydra import GlobalHydra
from hydra.core.object_type import ObjectType
from omegaconf import DictConfig, OmegaConf
from rich.console import Console

from actprune.cli.build import build, resolved
from actprune.cli.names import choice
from actprune.core.errors import ConfigError
from actprune.core.views import Criterion


def all_criteria() -> list[str]:
    """Every file of the pruner folder that holds a criterion."""
    return [name for name in _files() if not name.startswith("_") and "criterion" in _file(name)]


def criteria_named(names: Iterable[str], config: DictConfig, key: str) -> dict[str, Criterion]:
    """Name -> criterion of that file of ``conf/pruner``; of the chosen pruner, with the settings that it was given.

    Args:
        names: of files.
        config: the resolved configuration.
        key: where they were asked for; messages begin with it.

    Raises:
        ConfigError: there is no such file, it has no criterion, or settings were given for a criterion that is not asked for.
    """
    names = list(names)
    for name, given in own_settings(config).items():
        if name not in names:
            key_given, value = next(iter(given.items()))
            raise ConfigError(
                f"pruner.criterion.{key_given}={value} is of pruner={name}, which is not among {key}=[{', '.join(names)}]: it "
                f"would have no effect; add {name} to {key}, or leave pruner.criterion.{key_given} out"
            )
    return {name: build(_node(name, config, key), f"pruner.{name}.criterion") for name in names}


def own_settings(config: DictConfig) -> dict[str, dict[str, Any]]:
    """Of the chosen pruner: its name -> the settings of its criterion that are others than in its file; empty where none is."""
    name = choice("pruner")
    if name is None or _chosen(config) is None:
        return {}
    given: Any = OmegaConf.to_container(_chosen(config))
    written: Any = OmegaConf.to_container(_written(name, config))
    changed = {key: given.get(key) for key in {**written, **given} if given.get(key) != written.get(key)}
    return {name: changed} if changed else {}


def print_own_settings(config: DictConfig, console: Console) -> None:
    """Print ``own_settings`` in one line, where there are any."""
    for name, given in own_settings(config).items():
        each = ", ".join(f"{key}={value}" for key, value in given.items())
        console.print(f"settings that are not the default: {name}({each})", highlight=False)


def _node(name: str, config: DictConfig, key: str) -> DictConfig:
    reason = f"there is no pruner={name}" if name not in _files() else f"pruner={name} has no criterion"
    if name not in _files() or "criterion" not in _file(name):
        raise ConfigError(f"{key}: {reason}; choose from {', '.join(all_criteria())}")
    return _chosen(config) if name == choice("pruner") else _written(name, config)


def _chosen(config: DictConfig) -> Any:
    return None if config.pruner is None else config.pruner.get("criterion")


def _written(name: str, config: DictConfig) -> DictConfig:
    """The criterion of a file; what it takes from other places of the configuration is found there."""
    known: Any = OmegaConf.to_container(config, enum_to_str=True)
    return resolved(OmegaConf.create({**known, "asked": _file(name).criterion})).asked


def _files() -> list[str]:
    return GlobalHydra.instance().config_loader().get_group_options("pruner", ObjectType.CONFIG)


def _file(name: str) -> DictConfig:
    """A file of the pruner folder as it is written, wherever on Hydra's search path."""
    found = GlobalHydra.instance().config_loader().repository.load_config(f"pruner/{name}")  # type: ignore[attr-defined]
    return found.config
