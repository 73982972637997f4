"""The callback: observe in validation, decide when it ends, cut before the next training epoch.

Deciding and cutting are apart so that every checkpoint agrees with its metric: one that is written after a validation
epoch holds the network that was validated, and the plan that is still to be executed. No maths here: see ``Pruner``, ``Guard``.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from lightning import Callback, LightningModule, Trainer

from actprune.compensation import Compensation
from actprune.core.budget import Budget
from actprune.core.plan import Plan
from actprune.core.signals import held
from actprune.core.views import Criterion
from actprune.pruning import Pruner, Selection
from actprune.schedule import Schedule
from actprune.training.deciding import WAITS, Plans, carry_out, check_kinds, decide, folded, go_back, keep_last, regroup, watch
from actprune.training.events import broke_after_cut, close, log_gauges, measured, say, sizes, step_event, step_line, tell
from actprune.training.finding import Finder, names
from actprune.training.gradients import Loss, check_loss
from actprune.training.guard import Guard, drop_limit, guard_for
from actprune.training.logging import define_axes, log_row, logged_since
from actprune.training.observer import Observer
from actprune.training.resume import CheckpointHooks
from actprune.training.snapshot import Snapshot
from actprune.training.strategy import check_strategy, monitored
from actprune.training.timing import Timetable, check_validation, ends_epoch, epochs_trained

SETTINGS = ("criterion", "budget", "selection", "compensation", "positions")  # what every pruner is made with
_STATE = ("_plans", "_decided", "_seconds", "history", "events")


class PruningCallback(Callback):
    """Prune the network of any LightningModule while it trains.

    The network and an example of its inputs are found by watching validation; groups, sites and costs by tracing it.
    In validation epochs after which a step is due, statistics are observed; the plan made from them is executed before the
    next training epoch, on the live optimizers. Settings that cannot work (no validation data, an unreachable budget, nothing
    to cut, a schedule that does not fit) raise before training where the network can be run that early, else in validation.

    Args:
        criterion: scores the units.
        budget: what is left at the end, of every pruned network.
        schedule: when how much of the reduction is due; the default fits the trainer's ``max_epochs``.
        selection: how scores and budget become a plan; the default ranks all groups of a network together.
        compensation: folds what removed units contributed into what stays; by default their mean, into biases. None: nothing.
        monitor: the validation metric to record beside the size; the default is what the trainer's checkpoints follow.
        positions: how many of each unit's positions in a sample the criterion's statistics see; None: all; "auto": by samples.
        modules: dotted names of the submodules that are pruned, each to the budget; None: what validation runs.
        copies: dotted name of a submodule that averages another one (a momentum encoder) -> name of that one; it takes the same
            cuts. Averages that Lightning's callbacks or torch's ``AveragedModel`` keep are found without.
        stop: ``"budget"``, or ``"no_loss"``, short for ``max_metric_drop=0``.
        max_metric_drop: how much worse than before pruning ``monitor`` may stay after recovery, in its own unit; a step that
            costs more is taken back (see ``guard.py``). None: whatever it costs.
        mode: ``"max"`` if more of ``monitor`` is better, ``"min"`` if less; None: as its name, or a callback, says.
        loss: for criteria of the loss: module and batch -> mean loss; None: what ``training_step`` returns.

    Raises:
        ConfigError: an argument is not what it should be.
    """

    _hooks: CheckpointHooks  # from setup on
    _before: dict[str, Any]  # what was logged before the validation that runs

    def __init__(
        self,
        criterion: Criterion,
        budget: Budget,
        schedule: Schedule | None = None,
        selection: Selection | None = None,
        compensation: Compensation | Literal["mean"] | None = "mean",  # no object: LightningCLI writes defaults to a file
        monitor: str | None = None,
        positions: int | Literal["auto"] | None = "auto",
        *,
        modules: Sequence[str] | None = None,
        copies: Mapping[str, str] | None = None,
        stop: str = "budget",
        max_metric_drop: float | None = None,
        mode: str | None = None,
        loss: Loss | None = None,
    ) -> None:
        super().__init__()
        check_kinds(criterion, budget)
        self.criterion, self.budget, self.loss = criterion, budget, loss
        self.schedule = schedule or Schedule()
        self.monitor, self.positions, self.mode = monitor, positions, mode
        self.modules = names(modules)
        self.copies = dict(copies or {})
        self.max_metric_drop = drop_limit(stop, max_metric_drop, mode)
        self.pruners: dict[str, Pruner] = {}
        """Dotted name of every pruned network -> its pruner, once validation has been seen; empty before."""
        self.history: list[dict[str, Any]] = []
        """A row per validation: epoch, step (pruning steps so far), params, macs, and the monitored metric if it was logged;
        one more, without the metric, where the network was changed after the last validation."""
        self.events: list[dict[str, Any]] = []
        """One entry per executed step, and per step taken back: epoch, step, params, macs, widths, seconds."""
        self.stopped: dict[str, str] = {}
        """When training has ended, why pruning stopped: ``reason`` (budget, metric, threshold or epochs) and ``message``."""
        self.guard: Guard | None = None
        """Judges steps, with ``max_metric_drop``."""
        self.selection = selection or Selection()
        self.compensation = folded(compensation)
        self._plans: Plans = {}
        self._decided = -1
        self._seconds: dict[str, float] = {}
        self._timetable: Timetable | None = None
        self._finder: Finder | None = None
        self._observer: Observer | None = None

    @property
    def pruner(self) -> Pruner | None:
        """The pruner of the network, of the first one where there are several; None before validation has been seen."""
        return next(iter(self.pruners.values()), None)

    # before training

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Let checkpoints carry the surgery record; refuse what cannot work.

        Raises:
            ConfigError: the strategy shards parameters, or the schedule does not fit the trainer.
        """
        self._hooks = CheckpointHooks.attach(pl_module)
        self._hooks.copies = self.copies
        if stage != "fit":
            return
        check_strategy(trainer)
        check_loss(pl_module, self.criterion, self.loss)
        self._timetable = Timetable.of(self.schedule, trainer)
        self._finder, self.pruners = Finder(pl_module, self._hooks, self.modules, self.copies), {}
        if trainer.current_epoch == 0:
            self._plans, self._decided, self.history, self.events, self.stopped, self.guard = {}, -1, [], [], {}, None
        self.guard = guard_for(trainer, self.monitor or monitored(trainer), self.max_metric_drop, self.mode, self.guard)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find the networks right now if no sanity check is going to show them.

        Raises:
            ConfigError: there is no validation, so nothing can be observed; or a named module is wrong.
            ActPruneError: a network cannot be traced, or the budget cannot be reached.
        """
        check_validation(trainer, pl_module)
        self._finder.check_names()  # type: ignore[union-attr]
        define_axes(trainer)
        self._hooks.give_saved_order(trainer.optimizers)
        if trainer.num_sanity_val_steps == 0:
            self._find(trainer)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find the networks now if the sanity check was skipped, as it is when a run is resumed in the middle of one."""
        self._find(trainer)
        self._hooks.give_saved_types(trainer.optimizers)

    # validation

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start to observe if a step is due after this epoch."""
        self._before = dict(trainer.callback_metrics)
        if self._finder is not None:
            self._observer = watch(trainer, self._finder, self.pruners, self._due(trainer), self.loss)

    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Watch batches until the networks are known; number the samples that are observed."""
        if self._finder is not None:
            self._finder.begin(batch, dataloader_idx)
        if self._observer is not None:
            self._observer.batch(batch, batch_idx, dataloader_idx)

    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Trace the networks as soon as they are known; run the batch once more for criteria of gradients.

        Raises:
            ActPruneError: a network cannot be traced, the budget cannot be reached, or a batch has no gradient.
        """
        if self._finder is not None and self._finder.end(batch, dataloader_idx):
            self._trace(trainer, self._finder)
            if batch_idx == dataloader_idx == 0:  # else what was validated before would be missing
                self._observer = watch(trainer, self._finder, self.pruners, self._due(trainer), self.loss, batch)
        if self._observer is not None:
            self._observer.done()

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop observing, and merge what all processes saw.

        Raises:
            ConfigError: a module that is to be pruned took no part in the whole validation.
        """
        if trainer.sanity_checking or self._finder is None:
            return
        self._finder.check()
        if self.pruners:
            pl_module.log("prune/step", float(sizes(self.pruners.values())["step"]), logger=False, sync_dist=True)
        if self._observer is not None:
            self._observer.stop()
            self._observer.reduce()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Record size and metric of the network that was validated; judge the last step by it; decide on the next one.

        Raises:
            ActPruneError: activations are missing or not finite, or the budget cannot be reached.
        """
        if trainer.sanity_checking or not self.pruners or self._timetable is None:
            return
        self._record(trainer)
        observer, self._observer = self._observer, None
        due = self._due(trainer)
        if observer is None or due is None or (self.guard is not None and self.guard.waits):
            return
        began, epoch = time.perf_counter(), trainer.current_epoch
        if self.guard is not None and self.guard.goes_back:
            self._decided = epoch
            return
        plans = decide(trainer, self.pruners, observer.observations, due)
        with held():  # decided only now: whoever breaks off before finds the step still due
            self._plans, self._decided = plans, epoch
            if self.guard is not None:
                self.guard.begin(due, self._timetable.recovered(epoch), cuts=bool(plans))
            self._seconds = {"observing": observer.seconds, "planning": time.perf_counter() - began}

    # training

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Execute what the last validation decided: a step, or the way back.

        Raises:
            SurgeryError: a cut network does not work; it was put back.
        """
        if not self.pruners:
            if self._plans:
                say(pl_module, WAITS)
        elif self.guard is not None and self.guard.goes_back:
            self._go_back(trainer)
        elif self._plans:
            with held():  # a checkpoint that a signal asks for holds all of the step or nothing of it
                self._step(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the peak of memory, and sizes in epochs without validation too."""
        if self.pruners:
            validated = bool(self.history) and self.history[-1]["epoch"] == trainer.current_epoch
            log_gauges(trainer, pl_module, None if validated else sizes(self.pruners.values()))

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Judge a step whose recovery ends with training; leave no last checkpoint of a network that lost."""
        self._last_verdict(trainer)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Record a network that no validation saw; say why pruning stopped."""
        if self._timetable is None:
            return
        self._find(trainer)  # a run that is resumed after its last epoch has seen no validation
        self._last_verdict(trainer)
        self.stopped = close(trainer, self.history, self.events, self.budget, self.pruners.values(), self.guard)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Leave no hook behind."""
        self._stop_watching()
        self._timetable = self._finder = None

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leave no hook behind when training breaks off; say so if it was in the first epoch of a smaller network."""
        self._stop_watching()
        if isinstance(exception, RuntimeError) and self.events and self.events[-1]["epoch"] == trainer.current_epoch:
            pl_module.print(broke_after_cut(self.events[-1]))

    # checkpoints

    def state_dict(self) -> dict[str, Any]:
        """Plans still to be executed, the last epoch that was decided, the history, and what the guard knows."""
        return {**{name: getattr(self, name) for name in _STATE}, "guard": self.guard and self.guard.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on where the checkpoint was written; the networks are traced anew."""
        vars(self).update(copy.deepcopy({name: state_dict[name] for name in _STATE}))
        if self.guard is not None and state_dict["guard"] is not None:
            self.guard.load_state_dict(state_dict["guard"])
        self.pruners = {}

    # parts

    def _due(self, trainer: Trainer) -> float | None:
        """Share of the whole reduction that the step after this validation aims at; None: no step now."""
        if self._timetable is None or not ends_epoch(trainer):
            return None
        due = self._timetable.due(self._decided, trainer.current_epoch)
        return due if due is None or self.guard is None else self.guard.share(due)

    def _find(self, trainer: Trainer) -> None:
        with held(interrupts=False):
            if self._finder is not None and self._finder.probe(trainer):
                self._trace(trainer, self._finder)

    def _trace(self, trainer: Trainer, finder: Finder) -> None:
        with held(interrupts=False):  # a tracer would see what is saved meanwhile
            self.pruners = finder.pruners(**{name: getattr(self, name) for name in SETTINGS})
        regroup(trainer.optimizers, self.pruners)

    def _record(self, trainer: Trainer) -> None:
        """Add a row to the history and to every logger, and let the guard see the metric."""
        row: dict[str, Any] = {"epoch": trainer.current_epoch, **sizes(self.pruners.values())}
        monitor, logged = self.monitor or monitored(trainer), logged_since(trainer, self._before)
        row |= measured(trainer.lightning_module, logged, self.monitor, monitor, first=not self.history)
        self.history.append(row)
        log_row(trainer, row)
        if self.guard is not None:
            self.guard.see(trainer.strategy.broadcast(row.get(str(monitor))), logged)
            if ends_epoch(trainer):
                self.guard.judge(trainer.current_epoch)

    def _step(self, trainer: Trainer) -> None:
        before, plans = sizes(self.pruners.values()), {path: Plan.from_dict(plan) for path, plan in self._plans.items()}
        if self.guard is not None:
            self.guard.snapshot, self.guard.back_at = Snapshot.take(trainer, self._hooks), None
        self._seconds["cutting"] = carry_out(trainer, self._hooks, self.pruners, self._plans)
        self.events.append(step_event(trainer.current_epoch, self.pruners, plans, before, self._seconds))
        tell(trainer, self.events[-1], step_line(self.events[-1], self.pruners.values()))

    def _last_verdict(self, trainer: Trainer) -> None:
        if self.guard is not None and self.pruners:
            self.guard.judge(epochs_trained(trainer) - 1, last=True)
            if self.guard.goes_back:
                self._go_back(trainer)
            keep_last(trainer, self.guard)

    def _go_back(self, trainer: Trainer) -> None:
        assert self.guard is not None
        with held():
            before = sizes(self.pruners.values())
            seconds = {"cutting": go_back(trainer, self._hooks, self.guard)}
            self._trace(trainer, self._finder)  # type: ignore[arg-type]
            event = step_event(trainer.current_epoch, self.pruners, {}, before, seconds)
            self.events.append({**event, "went_back": True})
            tell(trainer, event, f"{self.guard.verdict()}: back to {event['params'][1]:,} parameters")

    def _stop_watching(self) -> None:
        for watching in (self._finder, self._observer):
            if watching is not None:
                watching.stop()
        self._observer = None
