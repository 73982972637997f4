"""Weights & Biases without a question: offline unless the user is logged in or asks for more."""

from __future__ import annotations

import netrc
import os
import sys
from collections.abc import Sequence
from typing import Any
from urllib.parse import urlsplit

from lightning.pytorch.loggers import Logger, WandbLogger

from actprune.core.errors import ConfigError


def wandb_logger(
    save_dir: str,
    project: str,
    name: str | None = None,
    group: str | None = None,
    offline: bool | None = None,
    tags: Sequence[str] = (),
) -> WandbLogger:
    """A logger for one run, which writes into the run's own folder.

    Args:
        save_dir: folder that gets the ``wandb`` folder.
        project: project on the server.
        name: the run's name; W&B invents one if None.
        group: runs of one sweep share it.
        offline: keep everything on disk (``wandb sync`` sends it later); if None, unless there is a login.
        tags: labels.

    Raises:
        ConfigError: online was asked for without a login, which would end in a prompt.
    """
    import wandb

    if offline is None:
        offline = not logged_in()
    elif not offline and not logged_in():
        raise ConfigError(
            "offline=false needs a login at Weights & Biases; run `wandb login` or set WANDB_API_KEY, or leave offline=null"
        )
    settings = wandb.Settings(console="off", silent=True)
    logger = WandbLogger(
        save_dir=save_dir, project=project, name=name, group=group, offline=offline, tags=list(tags), settings=settings
    )
    logger._wandb_init.pop("anonymous", None)  # Lightning always passes it, and W&B prints that it is of no use
    return logger


def log_config(logger: Logger, config: Any) -> None:
    """Send the configuration to a logger, with which W&B starts its run.

    Raises:
        ConfigError: W&B cannot start: a key that it does not take, or no network.
    """
    try:
        logger.log_hyperparams(config)
    except Exception as error:
        if not type(error).__module__.startswith("wandb"):
            raise
        raise ConfigError(
            f"Weights & Biases does not start ({type(error).__name__}: {error}); logger.wandb.offline=true keeps the run on "
            "disk, logger=csv does without"
        ) from error


def logged_in() -> bool:
    """Whether W&B would work online without asking: a key in the environment or in the netrc file."""
    mode = os.environ.get("WANDB_MODE")
    if mode is not None and mode != "online":
        return False
    if os.environ.get("WANDB_API_KEY"):
        return True
    host = urlsplit(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""
    try:
        return netrc.netrc().authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False


def finish() -> None:
    """End the run of this process, if there is one: the next job of a sweep must not write into it."""
    wandb = sys.modules.get("wandb")
    if wandb is not None and wandb.run is not None:
        wandb.finish()
