"""The callback: observe in validation, decide when validation ends, cut before the next training epoch.

Deciding and cutting are apart so that every checkpoint agrees with its metric: one that is written after a validation
epoch holds the network that was validated, and the plan that is still to be executed. No maths here: ``Pruner`` does
the work.
"""

from __future__ import annotations

import os
import time
from contextlib import ExitStack
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer

from actprune.compensation import Compensation, Mean
from actprune.core.budget import Budget
from actprune.core.errors import ActPruneError, ConfigError
from actprune.core.plan import Plan
from actprune.core.views import Criterion
from actprune.pruning import Observation, Pruner, Selection
from actprune.schedule import Schedule
from actprune.training.example import Network, Watcher, from_example_input_array, n_samples
from actprune.training.logging import define_axes, log_row
from actprune.training.probe import validation_network
from actprune.training.resume import CheckpointHooks
from actprune.training.strategy import check_strategy, monitored, restart_best, rewrap
from actprune.training.timing import Timetable, ends_epoch

_MEAN = Mean()


class PruningCallback(Callback):
    """Prune the network of any LightningModule while it trains.

    The network and an example of its inputs are found by watching validation; groups, sites and costs by tracing it.
    In validation epochs after which a step is due, statistics are observed; the plan made from them is executed
    before the next training epoch, on the live optimizers. Settings that cannot work (no validation data, an
    unreachable budget, a network without a cuttable group, a schedule that does not fit) raise before the first
    training step wherever the network can be run that early, and at the first validation batch otherwise.

    Args:
        criterion: scores the units.
        budget: what is left at the end.
        schedule: when how much of the reduction is due; the default fits the trainer's ``max_epochs``.
        selection: how scores and budget become a plan; the default ranks all groups together.
        compensation: folds what removed units contributed into what stays; by default their mean, into biases. None:
            nothing.
        monitor: the validation metric to record beside the size; the default is what the trainer's checkpoints follow.
    """

    def __init__(
        self,
        criterion: Criterion,
        budget: Budget,
        schedule: Schedule | None = None,
        selection: Selection | None = None,
        compensation: Compensation | None = _MEAN,
        monitor: str | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(criterion, Criterion):
            raise ConfigError(f"criterion must be a Criterion such as Entropy(), got {criterion!r}")
        if not isinstance(budget, Budget):
            raise ConfigError(f"budget must be a Budget such as Budget(params=0.4), got {budget!r}")
        self.criterion = criterion
        self.budget = budget
        self.schedule = schedule or Schedule()
        self.monitor = monitor
        self.pruner: Pruner | None = None
        """Knows the network once validation has been seen; None before."""
        self.history: list[dict[str, Any]] = []
        """One row per validation epoch: epoch, step (pruning steps so far), params, macs and the monitored metric."""
        self.selection = selection or Selection()
        self.compensation = compensation
        self._plan: dict[str, Any] | None = None
        self._decided = -1
        self._timetable: Timetable | None = None
        self._hooks: CheckpointHooks | None = None
        self._network: Network | None = None
        self._watcher: Watcher | None = None
        self._observation: Observation | None = None
        self._observing = ExitStack()
        self._batch_size = 0
        self._position = (0, 0)

    # before training

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Let checkpoints carry the surgery record; refuse what cannot work.

        Raises:
            ConfigError: the strategy shards parameters, or the schedule does not fit the trainer.
        """
        self._hooks = CheckpointHooks.attach(pl_module)
        if stage != "fit":
            return
        check_strategy(trainer)
        self._timetable = Timetable.of(self.schedule, trainer)
        self.pruner = None
        if trainer.current_epoch == 0:
            self._plan, self._decided, self.history = None, -1, []

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find the network right now if no sanity check is going to show it.

        Raises:
            ConfigError: there is no validation, so nothing can be observed.
            ActPruneError: the network cannot be traced, or the budget cannot be reached.
        """
        if not trainer.enable_validation:
            raise ConfigError(
                f"PruningCallback observes activations in validation, but {type(pl_module).__name__} has none "
                f"(limit_val_batches={trainer.limit_val_batches}); define validation_step and give fit a validation "
                "loader"
            )
        define_axes(trainer)
        if self.pruner is None and trainer.num_sanity_val_steps == 0:
            network = validation_network(trainer, pl_module) or from_example_input_array(pl_module)
            if network is not None:
                self._found(network)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find the network now if the sanity check was skipped, as it is when a run is resumed in the middle of one."""
        if self.pruner is None:
            network = validation_network(trainer, pl_module)
            if network is not None:
                self._found(network)

    # validation

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start to observe if a step is due after this epoch."""
        if self._is_due(trainer) and self.pruner is not None and self._network is not None:
            self._observe(trainer, self.pruner, self._network)

    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Watch the first batch ever to find the network; number the samples of observed ones."""
        if self._timetable is None:
            return
        if self.pruner is None:
            self._watcher = Watcher(pl_module)
            self._watcher.start()
        elif self._observation is not None:
            self._position = (batch_idx, dataloader_idx)
            if self._network is not None and self._network.replays:
                self._number(trainer, n_samples(batch))

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Stop watching, and trace the network that was seen.

        Raises:
            ActPruneError: the network cannot be traced, or the budget cannot be reached.
        """
        if self._watcher is None:
            return
        self._watcher.stop()
        network, self._watcher = self._watcher.network(batch), None
        self._found(network)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Decide which units leave, if a step is due; the same on every process.

        Raises:
            ActPruneError: activations are missing or not finite, or the budget cannot be reached.
        """
        if trainer.sanity_checking or self.pruner is None or self._timetable is None:
            return
        pl_module.log("prune/step", float(len(self.pruner.record.steps)), logger=False, sync_dist=True)
        due = self._timetable.due(self._decided, trainer.current_epoch)
        if self._observation is None or due is None:
            return
        observation = self._observation
        self._stop_observing()
        observation.reduce()
        self._plan = self._decide(trainer, self.pruner, observation, due)
        self._decided = trainer.current_epoch

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Record size and metric of the network that was validated, here and in every logger."""
        if trainer.sanity_checking or self.pruner is None or self._timetable is None:
            return
        row: dict[str, Any] = {"epoch": trainer.current_epoch, **_size(self.pruner)}
        monitor = self.monitor or monitored(trainer)
        if monitor in trainer.callback_metrics:
            row[monitor] = float(trainer.callback_metrics[monitor])
        self.history.append(row)
        log_row(trainer, row)

    # training

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Execute the plan that the last validation left, if there is one.

        Raises:
            SurgeryError: the cut network does not work; it was put back.
        """
        if self._plan is None or self.pruner is None or self._hooks is None:
            return
        began, before = time.perf_counter(), _size(self.pruner)
        plan = Plan.from_dict(self._plan)
        self._hooks.remember_original()
        with torch.inference_mode(False):
            self.pruner.execute(plan, optimizers=trainer.optimizers)
        self._plan = None
        rewrap(trainer)
        restart_best(trainer)
        pl_module.print(_line(trainer, self.pruner, plan, before, time.perf_counter() - began))

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say so if training stopped before the schedule was done."""
        if self._timetable is not None and (self._plan is not None or self._timetable.last > self._decided):
            pl_module.print(
                f"training ended at epoch {trainer.current_epoch} of {trainer.max_epochs}, before the last step; "
                f"the budget {self.budget.unit}={self.budget.share:g} was not reached"
            )

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Leave no hook behind."""
        self._stop_watching()
        self._timetable = None

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leave no hook behind when training breaks off."""
        self._stop_watching()

    # checkpoints

    def state_dict(self) -> dict[str, Any]:
        """The plan still to be executed, the last epoch that was decided, and the history."""
        return {"plan": self._plan, "decided": self._decided, "history": self.history}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on where the checkpoint was written; the network is traced anew."""
        self._plan = state_dict["plan"]
        self._decided = state_dict["decided"]
        self.history = [dict(row) for row in state_dict["history"]]
        self.pruner = None

    # parts

    def _is_due(self, trainer: Trainer) -> bool:
        if self._timetable is None or trainer.sanity_checking or not ends_epoch(trainer):
            return False
        return self._timetable.due(self._decided, trainer.current_epoch) is not None

    def _found(self, network: Network) -> None:
        assert self._hooks is not None
        self._network = network
        self._hooks.path = network.path
        self.pruner = Pruner(
            network.module,
            network.example_inputs,
            self.criterion,
            self.budget,
            selection=self.selection,
            compensation=self.compensation,
            seed=int(os.environ.get("PL_GLOBAL_SEED", 0)),
        )

    def _observe(self, trainer: Trainer, pruner: Pruner, network: Network) -> None:
        self._batch_size = 0
        announce = network.calls(lambda args, kwargs: self._number(trainer, n_samples((args, kwargs))))
        self._observing.enter_context(announce)
        self._observation = self._observing.enter_context(pruner.observe())

    def _stop_observing(self) -> None:
        self._observing.close()
        self._observation = None

    def _stop_watching(self) -> None:
        self._stop_observing()
        if self._watcher is not None:
            self._watcher.stop()
            self._watcher = None

    def _number(self, trainer: Trainer, n: int) -> None:
        assert self._observation is not None
        # The sampler of process r of R hands out samples r, r + R, r + 2R, ...: the same number for the same sample.
        self._batch_size = self._batch_size or n
        batch_idx, dataloader_idx = self._position
        within = batch_idx * self._batch_size + torch.arange(n)
        self._observation.begin_batch(within * trainer.world_size + trainer.global_rank + (dataloader_idx << 40))

    def _decide(self, trainer: Trainer, pruner: Pruner, observation: Observation, due: float) -> dict[str, Any] | None:
        decision: dict[str, Any] = {"plan": None, "error": None}
        if trainer.is_global_zero:
            try:
                plan = pruner.plan(observation, due)
                decision["plan"] = None if plan is None else plan.to_dict()
            except ActPruneError as error:
                decision["error"] = error
        decision = trainer.strategy.broadcast(decision)
        if decision["error"] is not None:
            raise decision["error"]
        return decision["plan"]


def _size(pruner: Pruner) -> dict[str, int]:
    return {"step": len(pruner.record.steps), "params": pruner.params, "macs": pruner.macs}


def _line(trainer: Trainer, pruner: Pruner, plan: Plan, before: dict[str, int], seconds: float) -> str:
    after = _size(pruner)
    groups = f"{len(plan.groups)} group{'s' if len(plan.groups) > 1 else ''}"
    return (
        f"pruning step {after['step']}, before epoch {trainer.current_epoch + 1}: "
        f"params {before['params']:,} -> {after['params']:,} ({after['params'] / pruner.params_before:.1%}), "
        f"MACs {metric_prefix(before['macs'])} -> {metric_prefix(after['macs'])} "
        f"({after['macs'] / pruner.macs_before:.1%}), {groups}, {seconds:.1f} s"
    )


def metric_prefix(count: int) -> str:
    """Spell a count with three digits: ``4110000`` -> ``4.11M``."""
    for size, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if count >= size:
            return f"{count / size:.3g}{prefix}"
    return str(count)
