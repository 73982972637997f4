"""One job: build everything, train and prune, test, write the output folder, show what happened."""

from __future__ import annotations

import logging
import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning import Callback, LightningDataModule, LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import LearningRateMonitor
from omegaconf import DictConfig, OmegaConf

from actprune.cli import output, post_training, wandb
from actprune.cli.build import build, check, resolved
from actprune.cli.console import console, print_config
from actprune.cli.names import describe_run, sweep_name
from actprune.cli.planning import print_plan
from actprune.cli.recorder import Recorder
from actprune.cli.schema import Task
from actprune.core.errors import ConfigError
from actprune.training import PruningCallback, RandomState


@dataclass
class Parts:
    """The objects of one job."""

    data: LightningDataModule
    module: LightningModule
    pruning: PruningCallback | None
    recorder: Recorder
    trainer: Trainer


def run_job(config: DictConfig) -> float | None:
    """Run one job.

    Returns:
        The number that the job is judged by (``config.optimize``); None for ``task=plan``.

    Raises:
        ActPruneError: the configuration is wrong, data are missing, or the network cannot be pruned as asked.
    """
    config = resolved(config)
    _quiet()
    if config.seed < 0:
        raise ConfigError(f"seed={config.seed} must be at least 0")
    if config.ckpt_path is not None and not Path(config.ckpt_path).is_file():
        raise ConfigError(f"ckpt_path={config.ckpt_path} does not exist; runs keep theirs in OUTPUT_DIR/checkpoints")
    if config.optimize not in output.NUMBERS:
        raise ConfigError(f"optimize={config.optimize} must be one of {', '.join(output.NUMBERS)}")
    for key in ("trainer", "data", "model", "module", "pruner", "optimizer", "scheduler", "callbacks", "logger"):
        check(config[key], key)
    print_config(config)
    began = time.monotonic()
    seed_everything(config.seed, workers=True, verbose=False)
    try:
        parts = assemble(config)
        if config.task is Task.plan:
            print_plan(parts.data, parts.module, parts.pruning, parts.trainer)
            return None
        if config.task is Task.prune:
            summary = post_training.prune_network(config, parts.data, parts.module.net, parts.pruning)
            post_training.show(summary, Path(config.paths.output_dir), console())
            return summary[config.optimize]
        return _train(config, parts, began)
    finally:
        wandb.finish()


def assemble(config: DictConfig) -> Parts:
    """Build the objects of a job from a resolved configuration."""
    folder = Path(config.paths.output_dir)
    output.write_config(config, folder)
    data = build(config.data, "data")
    partials = {name: build(config[name], name) for name in ("optimizer", "scheduler") if config[name] is not None}
    module = build(config.module, "module", net=build(config.model, "model"), **partials)
    pruning = None if config.pruner is None else build(config.pruner, "pruner")
    recorder = Recorder(pruning, folder)
    loggers = [build(_named(node), f"logger.{name}") for name, node in (config.logger or {}).items()]
    callbacks: list[Callback] = [] if pruning is None else [pruning]
    callbacks += [recorder, RandomState()]
    callbacks += [build(node, f"callbacks.{name}") for name, node in (config.callbacks or {}).items()]
    if not loggers:
        callbacks = [callback for callback in callbacks if not isinstance(callback, LearningRateMonitor)]
    trainer = build(config.trainer, "trainer", callbacks=callbacks, logger=loggers)
    for logger in loggers:
        logger.log_hyperparams(OmegaConf.to_container(config))
    return Parts(data, module, pruning, recorder, trainer)


def _train(config: DictConfig, parts: Parts, began: float) -> float:
    trainer = parts.trainer
    trainer.fit(parts.module, datamodule=parts.data, ckpt_path=config.ckpt_path)
    if trainer.interrupted:
        raise KeyboardInterrupt
    tested = trainer.test(parts.module, datamodule=parts.data, verbose=False)
    results = output.Results(
        test_accuracy=tested[0]["test/accuracy"],
        history=parts.recorder.history,
        seconds=time.monotonic() - began,
    )
    if not trainer.is_global_zero:
        return 0.0
    pruner = None if parts.pruning is None else parts.pruning.pruner
    summary = output.write(config, parts.data, parts.module, pruner, results, trainer.loggers)
    output.show(summary, Path(config.paths.output_dir), console())
    return summary[config.optimize]


def _named(node: Any) -> Any:
    """Fill in what a logger is called, where the configuration leaves it open."""
    names = {"name": describe_run(), "group": sweep_name()}
    open_names = {key: value for key, value in names.items() if key in node and node[key] is None}
    return OmegaConf.merge(node, open_names)


def _quiet() -> None:
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    # Lightning 2.6 asks torch's pytree in a way that torch deprecated; nothing a user of either could change.
    warnings.filterwarnings("ignore", r"`isinstance\(treespec, LeafSpec\)` is deprecated")
    # A run that goes on from a checkpoint keeps its own in its own folder: nothing to warn about.
    warnings.filterwarnings("ignore", "The dirpath has changed from")
    # Data sets here are small enough to load in the main process; the hint to use workers would come twice in every
    # run.
    warnings.filterwarnings("ignore", ".*does not have many workers.*")
