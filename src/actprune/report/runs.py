"""Run directories as they lie on disk: each ``summary.json`` becomes a ``Run``, everything else a ``Problem``.

A run directory holds ``summary.json`` (written last, so it exists only after a complete run) and, when Hydra started
the job, ``.hydra/`` with the overrides. A directory with ``.hydra/`` and no summary is a job of a task that writes none, or one
that failed or is still running.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

SUMMARY, ANALYSIS, CAPACITY = "summary.json", "analysis.json", "capacity.json"
BASELINE = "none"
"""The criterion of a run that was trained alike and never pruned."""
REQUIRED = ("params_before", "params_after", "macs_before", "macs_after", "test_accuracy", "seed", "criterion")
"""Keys without which a summary cannot be compared."""

_ELSEWHERE = ("seed", "pruner", "data", "model")  # overrides that the summary says in keys of its own
_WITHOUT_EFFECT = ("hydra", "logger", "paths", "name", "tags", "group", "resume", "ckpt_path", "export", "optimize")
"""Settings that leave the numbers as they are: where a run writes, that it was resumed, what is done with its network."""

_OF_TASKS = {
    ANALYSIS: "a group influence analysis (task=analyze), with groups.csv, units.csv, removals.csv and spearman.csv",
    CAPACITY: "capacities of networks (task=capacity), with networks.csv and layers.csv",
}
"""Written last by tasks that have results of their own."""


@dataclass(frozen=True)
class Run:
    """One complete run; accuracies are shares in [0, 1]."""

    path: Path
    """The run directory."""
    criterion: str
    """What scored the units; ``none`` for the unpruned baseline."""
    seed: int
    params_before: int
    params_after: int
    macs_before: int
    macs_after: int
    test_accuracy: float
    val_accuracy: float | None = None
    seconds: float | None = None
    """Wall time of the run."""
    data: str = ""
    model: str = ""
    budget: str = ""
    """Share that should be left, e.g. ``params=0.4``; empty when unknown."""
    overrides: tuple[str, ...] = ()
    """Every other setting that was overridden on the command line, sorted."""
    commit: str = ""
    versions: str = ""
    """Library versions, as sorted JSON."""


@dataclass(frozen=True)
class Problem:
    """A run directory that cannot be compared, and why."""

    path: Path
    """The run directory."""
    reason: str
    overrides: tuple[str, ...] = ()
    """What the job was asked to do, where Hydra wrote it down."""


def read_runs(directory: str | os.PathLike[str]) -> tuple[list[Run], list[Problem]]:
    """Read every run directory in a tree, the tree's root included, in order of their paths.

    Hidden folders and ``wandb`` folders are not entered, links are not followed.
    """
    runs: list[Run] = []
    problems: list[Problem] = []
    for name, folders, files in os.walk(directory):
        path = Path(name)
        hydra = ".hydra" in folders
        folders[:] = sorted((f for f in folders if not f.startswith(".") and f != "wandb"), key=_natural)
        if SUMMARY not in files and not hydra:
            continue
        overrides: tuple[str, ...] = ()
        try:
            overrides = _overrides(path)
            if SUMMARY in files:
                runs.append(_read(path, overrides))
            else:
                problems.append(Problem(path, _why_none(files, overrides), overrides))
        except (ValueError, OSError, yaml.YAMLError) as error:
            problems.append(Problem(path, " ".join(str(error).split()), overrides))
    return runs, problems


def _why_none(files: Sequence[str], overrides: Sequence[str]) -> str:
    of_task = [f"{what}: it has results of its own, in {name}" for name, what in _OF_TASKS.items() if name in files]
    if "task=plan" in overrides:
        of_task.append("a plan (task=plan): nothing was pruned")
    return of_task[0] if of_task else f"no {SUMMARY}: the job failed or is still running"


def _natural(name: str) -> tuple[int, str]:
    """Sort key that puts job 10 after job 9."""
    return (int(name) if name.isdecimal() else -1, name)


def _read(path: Path, overrides: tuple[str, ...]) -> Run:
    try:
        summary = json.loads((path / SUMMARY).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{SUMMARY} is not valid JSON ({error})") from error
    if not isinstance(summary, dict):
        raise ValueError(f"{SUMMARY} holds a {type(summary).__name__} instead of key-value pairs")
    missing = [key for key in REQUIRED if key not in summary]
    if missing:
        raise ValueError(f"{SUMMARY} lacks {', '.join(missing)}")
    choices = _choices(path)
    return Run(
        path=path,
        criterion=_label(summary["criterion"]) or BASELINE,
        seed=_integer(summary, "seed", least=0),
        params_before=_integer(summary, "params_before"),
        params_after=_integer(summary, "params_after"),
        macs_before=_integer(summary, "macs_before"),
        macs_after=_integer(summary, "macs_after"),
        test_accuracy=_number(summary, "test_accuracy", most=1.0),
        val_accuracy=None if summary.get("val_accuracy") is None else _number(summary, "val_accuracy", most=1.0),
        seconds=None if summary.get("seconds") is None else _number(summary, "seconds"),
        data=_label(summary.get("data", choices.get("data"))),
        model=_label(summary.get("model", choices.get("model"))),
        budget=_budget(summary.get("budget")),
        overrides=tuple(o for o in overrides if _matters(o, budget_known=summary.get("budget") is not None)),
        commit=_label(summary.get("commit")),
        versions=_label(summary.get("versions")),
    )


def _number(summary: Mapping[str, Any], key: str, least: float = 0.0, most: float = math.inf) -> float:
    value = summary[key]
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ValueError(f"{key}={value!r} in {SUMMARY} is not a finite number")
    if not least <= value <= most:
        raise ValueError(f"{key}={value!r} in {SUMMARY} is outside [{least:g}, {most:g}]")
    return float(value)


def _integer(summary: Mapping[str, Any], key: str, least: int = 1) -> int:
    value = _number(summary, key, least)
    if value != int(value):
        raise ValueError(f"{key}={value!r} in {SUMMARY} is not a whole number")
    return int(value)


def _label(value: Any) -> str:
    """Spell a setting on one line: text as it is, nothing as nothing, anything else as sorted JSON."""
    if value is None or isinstance(value, str):
        return value or ""
    return json.dumps(value, sort_keys=True)


def _budget(value: Any) -> str:
    if not isinstance(value, dict):
        return _label(value)
    given = {key: share for key, share in value.items() if share is not None and not key.startswith("_")}
    return ", ".join(f"{key}={share}" for key, share in sorted(given.items()))


def _overrides(path: Path) -> tuple[str, ...]:
    """Read what Hydra wrote down of the command line of this job; of a setting that was given again, what was said last."""
    file = path / ".hydra" / "overrides.yaml"
    if not file.exists():
        return ()
    overrides = yaml.safe_load(file.read_text(encoding="utf-8"))
    if not isinstance(overrides, list):
        raise ValueError(f".hydra/{file.name} is not a list of overrides")
    return tuple(sorted({_key(str(override)): str(override) for override in overrides}.values()))


def _choices(path: Path) -> Mapping[str, Any]:
    """Read which file of each config folder this job used: data -> digits, model -> resnet20, ..."""
    file = path / ".hydra" / "hydra.yaml"
    if not file.exists():
        return {}
    try:
        return yaml.safe_load(file.read_text(encoding="utf-8"))["hydra"]["runtime"]["choices"]
    except (KeyError, TypeError) as error:
        raise ValueError(f".hydra/{file.name} lacks hydra.runtime.choices") from error


def _key(override: str) -> str:
    return override.lstrip("+~").split("=", 1)[0]


def _matters(override: str, budget_known: bool) -> bool:
    key = _key(override)
    if budget_known and "budget" in key.split("."):
        return False
    return key not in _ELSEWHERE and key.split(".")[0].split("/")[0].split("@")[0] not in _WITHOUT_EFFECT
