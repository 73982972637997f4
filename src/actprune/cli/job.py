"""One job: build everything, train and prune, test, write the output folder, show what happened."""

from __future__ import annotations

import logging
import os
import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning import Callback, LightningDataModule, LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import LearningRateMonitor
from lightning.pytorch.strategies.launchers import _SubprocessScriptLauncher
from omegaconf import DictConfig, OmegaConf
from torch import nn

from actprune.cli import analyze, capacity, output, post_training, resuming, wandb
from actprune.cli.build import build, check, check_budget, resolved
from actprune.cli.console import console, print_config
from actprune.cli.names import describe_run, sweep_name
from actprune.cli.planning import print_plan
from actprune.cli.recorder import Recorder
from actprune.cli.schema import Task
from actprune.cli.trained import fed
from actprune.core.errors import ConfigError, ExportError
from actprune.training import AtomicCheckpoints, PruningCallback, RandomState, SeReNe
from actprune.training.events import unseen
from actprune.training.exporting import check_formats, export
from actprune.training.storage import goes_on
from actprune.training.timing import epochs_trained


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
        The number that the job is judged by (``config.optimize``); None for ``task=plan``, ``analyze`` and ``capacity``.

    Raises:
        ActPruneError: the configuration is wrong, data are missing, or the network cannot be pruned as asked.
    """
    check_budget(config.budget)
    config = resolved(config)
    _quiet()
    summary = resuming.finished(config)
    if summary is not None:
        print(f"finished already: {config.paths.output_dir}")
        return summary[config.optimize]
    resuming.check_unused(config)
    if config.resume is not None:
        config.ckpt_path = resuming.where_to_go_on(config)
    if not 0 <= config.seed < 2**32:
        raise ConfigError(f"seed={config.seed} must be at least 0 and below 2^32")
    if config.ckpt_path is not None and not Path(config.ckpt_path).is_file():
        raise ConfigError(f"ckpt_path={config.ckpt_path} does not exist; runs keep theirs in OUTPUT_DIR/checkpoints")
    if config.resume is None and config.ckpt_path is not None and not goes_on(Path(config.ckpt_path)):  # else it was tried
        raise ConfigError(
            f"ckpt_path={config.ckpt_path} is no whole checkpoint with optimizer state; weights alone are model.weights=FILE"
        )
    if config.weights is not None and config.task in (Task.train, Task.plan):
        raise ConfigError(
            f"weights={config.weights} is what task=prune, analyze and capacity load; task={config.task.name} would pass it "
            "over; to train from weights give model.weights=FILE"
        )
    if config.calibration < 1 and config.task in (Task.prune, Task.analyze, Task.capacity):
        raise ConfigError(f"calibration={config.calibration} must be at least 1 image")
    if config.optimize not in output.NUMBERS:
        raise ConfigError(f"optimize={config.optimize} must be one of {', '.join(output.NUMBERS)}")
    _check_epochs(config)
    groups = ("trainer", "data", "model", "module", "pruner", "optimizer", "scheduler", "callbacks", "logger")
    for key in (*groups, "analyze", "capacity"):
        check(config[key], key)
    _check_trainer(config.trainer)
    check_formats(list(config.export))
    print_config(config)
    began = time.monotonic()
    seed_everything(config.seed, workers=True, verbose=False)
    try:
        parts = assemble(config)
        _refuse_parts(config.task, parts.pruning)
        if config.task is Task.plan:
            print_plan(parts.data, parts.module, parts.pruning, parts.trainer, Path(config.paths.output_dir))
            return None
        if config.task is Task.analyze:
            found = analyze.analyze_network(config, parts.data, _where_it_runs(parts))
            analyze.show(config, *found, console())
            return None
        if config.task is Task.capacity:
            measured = capacity.measure_networks(config, parts.data, parts.module.get_submodule("net"), parts.pruning)
            capacity.show(config, measured, console())
            return None
        if config.task is Task.prune:
            summary = post_training.prune_network(config, parts.data, _where_it_runs(parts), parts.pruning)
            output.tell_wandb(parts.trainer.loggers, summary)
            _export(config, parts)
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
    logs = config.task in (Task.train, Task.prune)  # the others have nothing for a logger
    loggers = [build(_named(node), f"logger.{name}") for name, node in (config.logger or {}).items() if logs]
    callbacks: list[Callback] = [] if pruning is None else [pruning]
    callbacks += [recorder, RandomState()]
    callbacks += [build(node, f"callbacks.{name}") for name, node in (config.callbacks or {}).items()]
    if not loggers:
        callbacks = [callback for callback in callbacks if not isinstance(callback, LearningRateMonitor)]
    plugins = {} if "plugins" in config.trainer else {"plugins": AtomicCheckpoints()}
    trainer = build(config.trainer, "trainer", callbacks=callbacks, logger=loggers, **plugins)
    _refuse_many_sweeps(trainer)
    for logger in loggers:
        wandb.log_config(logger, OmegaConf.to_container(config))
    return Parts(data, module, pruning, recorder, trainer)


def _train(config: DictConfig, parts: Parts, began: float) -> float:
    trainer = parts.trainer
    trainer.fit(parts.module, datamodule=parts.data, ckpt_path=config.ckpt_path)
    tested = trainer.test(parts.module, datamodule=parts.data, verbose=False)
    history, events = parts.recorder.history, [] if parts.pruning is None else parts.pruning.events
    if unseen(history, events):
        measured = trainer.validate(parts.module, datamodule=parts.data, verbose=False)[0]
        parts.recorder.add(epochs_trained(trainer) - 1, parts.module, measured)
    results = output.Results(
        val_accuracy=history[-1]["val_accuracy"] if history else None,
        test_accuracy=tested[0]["test/accuracy"],
        history=history,
        epochs=epochs_trained(trainer),
        seconds=time.monotonic() - began,
        stopped={} if parts.pruning is None else parts.pruning.stopped,
        events=events,
    )
    if not trainer.is_global_zero:
        return 0.0
    _export(config, parts)
    pruners = {} if parts.pruning is None else parts.pruning.pruners
    summary = output.write(config, parts.data, parts.module, pruners, results, trainer.loggers)
    output.show(summary, Path(config.paths.output_dir), console())
    return summary[config.optimize]


def _where_it_runs(parts: Parts) -> nn.Module:
    """The network, on the device that the trainer would train it on."""
    return parts.module.get_submodule("net").to(parts.trainer.strategy.root_device)


def _export(config: DictConfig, parts: Parts) -> None:
    if config.export:
        images, _ = next(iter(parts.data.val_dataloader()))
        net = parts.module.get_submodule("net")
        folder = Path(config.paths.output_dir)
        try:
            files = export(net, fed(net, images[:2]), folder / "exported", list(config.export))
        except ExportError as error:
            cure = f"; what was trained is kept: resume={folder} export=[] goes on without" if config.task is Task.train else ""
            raise ExportError(f"{error}{cure}") from error
        print(f"exported: {', '.join(path.name for path in files.values())}")


def _check_epochs(config: DictConfig) -> None:
    """Schedules count epochs; their own messages would name what they were given, and not where it came from."""
    counting = [name for name in ("scheduler", "pruner") if config[name] is not None]
    if counting and config.trainer.get("max_epochs") is None:
        raise ConfigError(
            f"trainer.max_epochs=null, and {' and '.join(counting)} go by the number of epochs; set it, beside "
            "trainer.max_steps or trainer.max_time if need be"
        )


def _check_trainer(node: Any) -> None:
    """Refuse what Lightning notices late, in the first epoch or in the test after the last, or never: too many processes."""
    for name in ("callbacks", "logger"):
        if name in node:
            raise ConfigError(f"trainer.{name}: {name} of a run are those of the group {name}; choose there")
    for name in ("check_val_every_n_epoch", "accumulate_grad_batches", "limit_train_batches", "limit_test_batches"):
        value = node.get(name)
        least = "above 0" if name.startswith("limit") else "at least 1"
        if isinstance(value, (int, float)) and value <= 0:
            raise ConfigError(f"trainer.{name}={value} must be {least}")
    on_cpu = node.get("accelerator") == "cpu" or node.get("accelerator") == "auto" and not torch.accelerator.is_available()
    devices, cores = str(node.get("devices")), os.cpu_count() or 1
    if on_cpu and devices.isdecimal() and int(devices) > cores:
        raise ConfigError(
            f"trainer.devices={devices} on the CPU would start {devices} processes, this machine has {cores} processor cores; "
            f"give at most trainer.devices={cores}"
        )


def _refuse_many_sweeps(trainer: Trainer) -> None:
    if sweep_name() is not None and trainer.world_size > 1 and isinstance(trainer.strategy.launcher, _SubprocessScriptLauncher):
        raise ConfigError(
            f"every one of the {trainer.world_size} processes of strategy=ddp would run the whole sweep; in a sweep give "
            "every job one device (trainer=cpu, trainer=gpu), or run the jobs one by one without -m"
        )


def _refuse_parts(task: Task, pruning: PruningCallback | None) -> None:
    named = [] if pruning is None else list(pruning.modules)
    if named not in ([], ["net"]) and task in (Task.plan, Task.prune, Task.capacity):
        raise ConfigError(
            f"pruner.modules={named} names parts of the network, and task={task.name} prunes it whole; leave modules out, or "
            "use task=train"
        )
    if task in (Task.plan, Task.prune) and isinstance(pruning, SeReNe):
        raise ConfigError(
            f"task={task.name} trains nothing, and pruner=serene has units leave that training made small; choose a criterion, "
            "e.g. pruner=entropy"
        )


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
    warnings.filterwarnings("ignore", "The dirpath has changed from|Checkpoint directory .* exists and is not empty")
    # Data sets here are small enough to load in the main process; the hint to use workers would come twice in every
    # run.
    warnings.filterwarnings("ignore", ".*does not have many workers.*")
