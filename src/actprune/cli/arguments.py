"""What Hydra would answer with a traceback: told in one message before it reads the command line."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path

from actprune.core.errors import ConfigError

_FOLDERS = ("hydra.run.dir", "hydra.sweep.dir")
_DEFAULT = "runs"


def check_arguments(arguments: Sequence[str], config_dir: Path) -> None:
    """Refuse groups without a choice, and output folders that cannot be made.

    Args:
        arguments: of the command line, as Hydra gets them.
        config_dir: whose folders are the groups.

    Raises:
        ConfigError: says which, and what would do.
    """
    if any(argument.startswith("--") and argument != "--multirun" for argument in arguments):
        return  # --help, --cfg: nothing runs
    given = [argument.partition("=")[::2] for argument in arguments if not argument.startswith("-")]
    for key, value in given:
        choices = sorted(file.stem for file in (config_dir / key).glob("*.yaml")) if re.fullmatch(r"\w+", key) else []
        if choices and (value in ("null", "") or value.startswith("_")):  # what others are made from
            raise ConfigError(f"{key}={value} is no choice; choose one of {', '.join(c for c in choices if c[0] != '_')}")
    for folder in folders_in(arguments) or [_DEFAULT]:
        _check_folder(folder)


def folders_in(arguments: Sequence[str]) -> list[str]:
    """The output folders that arguments name; the last one counts."""
    return [unquoted(argument) for argument in arguments if argument.partition("=")[0] in _FOLDERS]


def unquoted(argument: str) -> str:
    """The value of ``key=value``, without the quotes in which Hydra takes it."""
    return argument.partition("=")[2].strip("'\"")


def _check_folder(folder: str) -> None:
    known, filled_in, _ = folder.partition("${")
    if filled_in:  # what is not known yet starts inside a folder, or says where everything is
        known = known.rpartition("/")[0]
        if not known:
            return
    whole = Path(known).absolute()
    there = next(path for path in (whole, *whole.parents) if path.exists())
    if not (there.is_dir() and os.access(there, os.W_OK)):
        raise ConfigError(
            f"nothing can be written to {folder}: {there} is no folder, or read-only; hydra.run.dir=FOLDER "
            "(in a sweep hydra.sweep.dir=FOLDER) takes the output elsewhere"
        )
