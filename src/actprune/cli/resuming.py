"""``resume=DIR``: go on with a job or a sweep that was cut off, in its own folder, with the settings that it was started with.

Hydra wrote down what the command line said; that is said again, with the old folder as the output folder. Settings given beside
``resume`` come last and win. A job that has a summary is finished and is not run again, nor does it take other settings; one
with a checkpoint goes on from the newest that is whole; one without starts anew.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from actprune.cli.arguments import folders_in, unquoted
from actprune.cli.names import sweep_name
from actprune.cli.output import CONFIG
from actprune.core.errors import ConfigError
from actprune.core.files import atomic_path
from actprune.report.runs import SUMMARY
from actprune.training import newest_checkpoint

_OWN = ("hydra.mode=", "hydra.run.dir=", "hydra.sweep.dir=", "resume=", "ckpt_path=")
_NO_SETTINGS = ("-", "hydra.", "hydra/", "paths.", "ckpt_path=", "optimize=")
"""Arguments that say where and how a job runs, or what is asked of it."""
_NOWHERE = object()
_SWEEPER = "hydra._internal.core_plugins.basic_sweeper.BasicSweeper"


def command_line(arguments: list[str]) -> list[str]:
    """The arguments that Hydra gets: those of the old run where ``resume=DIR`` is among them, else as they are.

    Raises:
        ConfigError: DIR is no output folder of a job or a sweep, the sweep cannot be resumed, or the job is finished and did
            not run with what is given beside.
    """
    folder = _folder(arguments)
    if folder is None:
        return arguments
    others = [argument for argument in arguments if not argument.startswith("resume=")]
    settings = [argument for argument in others if not argument.startswith(_NO_SETTINGS)]
    if (folder / "multirun.yaml").is_file():
        others = [argument for argument in others if argument not in ("-m", "--multirun")]
        n = len(list(folder.glob(f"*/{SUMMARY}")))
        if n and settings:
            print(f"{n} finished job{'s' if n > 1 else ''} kept as before; {', '.join(settings)} is for the others")
        return ["-m", *_sweep(folder), *others, f"hydra.sweep.dir={_quoted(folder)}", f"resume={_quoted(folder)}"]
    if "-m" in others or "--multirun" in others:
        raise ConfigError(f"resume={folder} is one job, which -m cannot vary; leave -m out")
    written = folder / ".hydra" / "overrides.yaml"
    if not written.is_file():
        raise ConfigError(
            f"resume={folder} is no output folder: it has neither .hydra/overrides.yaml of a job nor multirun.yaml of a sweep; "
            "runs write theirs under runs/"
        )
    is_done = (folder / SUMMARY).is_file()
    late = ", ".join(setting for setting in settings if is_done and not _ran_with(folder, setting))
    if late:
        last = folder / "checkpoints" / "last.ckpt"
        there = (
            f"; there, ckpt_path={last} beside the settings of this run goes on from its last epoch" if last.is_file() else ""
        )
        raise ConfigError(f"{folder} is finished and did not run with {late}: leave that out, or use another folder{there}")
    return [*_kept(OmegaConf.load(written)), *others, f"hydra.run.dir={_quoted(folder)}", f"resume={_quoted(folder)}"]


@contextmanager
def as_they_ran(arguments: list[str]) -> Iterator[None]:
    """What a folder says of its jobs is what they ran with: Hydra writes down what is asked now before anybody can refuse it.

    Taken back where no job did any work: of finished ones, and of all where what was asked does not run.

    Args:
        arguments: what Hydra gets.
    """
    given = folders_in(arguments)
    folder = _path(given[-1]) if given else None
    jobs = [] if folder is None or not folder.is_dir() else [folder, *(path.parent for path in folder.glob("*/.hydra"))]
    said = {job: {file: file.read_bytes() for file in _sayings(job)} for job in jobs}
    work, is_refused = {job: _work(job) for job in jobs}, False
    try:
        yield
    except SystemExit as error:
        is_refused = _is_refusal(error)
        raise
    finally:
        idle = [job for job in jobs if _work(job) == work[job]]
        is_idle = idle == jobs  # a sweep says one thing of all its jobs
        for job in idle:
            if job / SUMMARY in work[job] or (is_refused and (job != folder or is_idle)):
                _say(said[job])


def where_to_go_on(config: DictConfig) -> str | None:
    """The checkpoint that a resumed job goes on from; None: start anew."""
    folder = Path(config.paths.output_dir) / "checkpoints"
    for path in folder.rglob(".*.ckpt"):  # what the kill left half written
        path.unlink()
    found = newest_checkpoint(folder)
    return None if found is None else str(found)


def finished(config: DictConfig) -> dict[str, Any] | None:
    """The summary of a resumed job that needs no more work; None if it needs some.

    Raises:
        ConfigError: the summary does not have the number that the job is judged by.
    """
    path = Path(config.paths.output_dir) / SUMMARY
    if config.resume is None or not path.is_file():
        return None
    summary = json.loads(path.read_text(encoding="utf-8"))
    if config.optimize not in summary:
        raise ConfigError(f"{path} has no {config.optimize}; leave optimize as it was when the job ran")
    return summary


def check_unused(config: DictConfig) -> None:
    """Refuse to write a run into the folder of another one: checkpoints and rows of both would be mixed.

    Raises:
        ConfigError: names what is there.
    """
    if config.resume is not None or config.ckpt_path is not None:
        return
    folder = Path(config.paths.output_dir)
    for path in (folder / SUMMARY, *sorted(folder.glob("checkpoints/*.ckpt"))):
        if path.is_file():
            whole, key = (folder, "run") if sweep_name() is None else (folder.parent, "sweep")
            raise ConfigError(
                f"{folder} holds another run ({path.relative_to(folder)}): resume={whole} goes on with that one, "
                f"hydra.{key}.dir=FOLDER takes this one elsewhere"
            )


def _folder(arguments: list[str]) -> Path | None:
    given = [argument for argument in arguments if argument.startswith("resume=")]
    if not given or given[-1] in ("resume=", "resume=null"):
        return None
    return _path(unquoted(given[-1]))


def _path(folder: str) -> Path:
    return Path(folder).expanduser().resolve()


def _sayings(job: Path) -> list[Path]:
    """Files that say what a job, or a sweep, was asked for."""
    return [path for path in (*job.glob(".hydra/*.yaml"), job / CONFIG, job / "multirun.yaml") if path.is_file()]


def _say(contents: dict[Path, bytes]) -> None:
    for file, content in contents.items():
        if not file.is_file() or file.read_bytes() != content:
            with atomic_path(file) as temporary:
                temporary.write_bytes(content)


def _work(job: Path) -> dict[Path, int]:
    """What a job goes on from, or what it ended with, and when that was written."""
    files = (path for pattern in (SUMMARY, "checkpoints/[!.]*", "pieces/[!.]*") for path in job.glob(pattern))
    return {path: path.stat().st_mtime_ns for path in files if path.is_file()}


def _is_refusal(error: SystemExit) -> bool:
    """Whether a job cannot run as it was asked: Hydra told of an error, and not of one of the machine."""
    told = error.__context__
    return error.code == 1 and told is not None and not isinstance(told.__cause__ or told, OSError)


def _ran_with(folder: Path, setting: str) -> bool:
    """Whether a job ran with a setting, given for it or not."""
    ran, hydra = folder / CONFIG, folder / ".hydra" / "hydra.yaml"
    try:
        override = OverridesParser.create().parse_override(setting)
        key, value = override.key_or_group, override.value()
        choices = OmegaConf.load(hydra).hydra.runtime.choices if hydra.is_file() else {}
        if key in choices:
            return str(choices[key]) == str(value)
        held = OmegaConf.select(OmegaConf.load(ran), key, default=_NOWHERE) if ran.is_file() else _NOWHERE
    except (HydraException, OmegaConfBaseException):
        return False
    held = OmegaConf.to_container(held) if OmegaConf.is_config(held) else held
    return not override.is_delete() and held == value and isinstance(held, bool) == isinstance(value, bool)


def _sweep(folder: Path) -> list[str]:
    hydra = OmegaConf.load(folder / "multirun.yaml").hydra
    if hydra.sweeper._target_ != _SWEEPER:
        raise ConfigError(
            f"resume={folder}: {hydra.sweeper._target_} chooses its jobs by itself, so they cannot be matched with the "
            "finished ones; resume the folder of a single job"
        )
    return _kept([*hydra.overrides.task, *hydra.overrides.hydra])


def _kept(overrides: Any) -> list[str]:
    return [str(override) for override in overrides if not str(override).startswith(_OWN)]


def _quoted(path: Path) -> str:
    text = str(path).replace("\\", "\\\\").replace("'", "\\'")
    return f"'{text}'"
