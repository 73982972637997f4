"""The Hydra entry: one job, or a sweep of them, with one clear message for everything that goes wrong on purpose."""

from __future__ import annotations

import logging
import os
import signal
import sys
from pathlib import Path
from typing import Any

import hydra
import torch.distributed as dist
from hydra.core.hydra_config import HydraConfig
from hydra.errors import CompactHydraException
from hydra.types import RunMode
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.exceptions import SIGTERMException
from omegaconf import DictConfig

from actprune.cli import resuming, schema
from actprune.cli.arguments import check_arguments
from actprune.cli.job import run_job
from actprune.cli.output import CONFIG
from actprune.core.errors import ActPruneError

_log = logging.getLogger(__name__)


class JobError(CompactHydraException):
    """A job failed for a reason that its message tells in full; Hydra prints the message alone and exits with 1."""


def main(config_dir: str | os.PathLike[str]) -> None:
    """Run what the command line asks for, with the configuration in ``config_dir``."""
    schema.register()
    try:
        sys.argv[1:] = resuming.command_line(sys.argv[1:])
        check_arguments(sys.argv[1:], Path(config_dir))
    except ActPruneError as error:
        sys.exit(f"{type(error).__name__}: {error}")
    try:
        with resuming.as_they_ran(sys.argv[1:]):
            hydra.main(version_base="1.3", config_path=str(Path(config_dir).resolve()), config_name="config")(_job)()
    finally:
        if dist.is_available() and dist.is_initialized() and dist.get_backend() == "gloo":
            dist.destroy_process_group()  # its threads may abort a process that ends with them, and Lightning leaves them


def _job(config: DictConfig) -> Any:
    sweep = HydraConfig.get().mode is RunMode.MULTIRUN
    try:
        return _interruptible(config)
    except ActPruneError as error:
        if sweep:  # Hydra tells of the first failed job only, and only when the last one is done
            print(f"job {HydraConfig.get().job.num} failed: {error}", file=sys.stderr, flush=True)
        raise JobError(f"{type(error).__name__}: {error}") from error
    except (OSError, MisconfigurationException) as error:
        message, folder = f"{type(error).__name__}: {error}", Path(config.paths.output_dir)
        if (folder / CONFIG).is_file():
            message += f"; what was written before is intact, resume={folder} goes on"
        if sweep:
            print(f"job {HydraConfig.get().job.num} failed: {message}", file=sys.stderr, flush=True)
        raise JobError(message) from error
    except SIGTERMException:  # which has no status of its own
        raise _stopped("SIGTERM", signal.SIGTERM, config) from None
    except Exception:
        if sweep:
            _log.exception("job %s failed", HydraConfig.get().job.num)
        raise


def _interruptible(config: DictConfig) -> Any:
    """Run a job; Ctrl-C ends it as such, whatever came of it: Lightning exits with 1, torch cannot close half a file."""
    try:
        return run_job(config)
    except BaseException as error:
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, KeyboardInterrupt):
            cause = cause.__context__
        if cause is None:
            raise
        raise _stopped("Ctrl-C", signal.SIGINT, config) from None


def _stopped(by: str, number: int, config: DictConfig) -> SystemExit:
    folder = Path(config.paths.output_dir)
    whole = folder if HydraConfig.get().mode is not RunMode.MULTIRUN else folder.parent
    print(f"stopped by {by}; resume={whole} goes on", file=sys.stderr, flush=True)
    return SystemExit(128 + number)
