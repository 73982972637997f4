"""Make the plans of one step on one process, and carry them out on all: networks, averaged copies, optimizers, DDP wrapper."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from lightning import Trainer
from lightning.pytorch.utilities.seed import isolate_rng
from torch.optim import Optimizer

from actprune.compensation import Compensation, Mean
from actprune.core.budget import Budget
from actprune.core.copied import mirrored
from actprune.core.errors import ActPruneError, ConfigError
from actprune.core.plan import Plan
from actprune.core.views import Criterion
from actprune.core.wrappers import compile_anew
from actprune.pruning import Observation, Pruner
from actprune.sparsity import unit_groups
from actprune.sparsity.proximal import Proximal
from actprune.training.copies import copies_of
from actprune.training.finding import Finder
from actprune.training.gradients import Loss
from actprune.training.guard import Guard
from actprune.training.observer import Observer
from actprune.training.references import followed, optimizers_of
from actprune.training.replay import harmless, validate
from actprune.training.resume import CheckpointHooks
from actprune.training.strategy import restart_best, rewrap, save_last_again

Plans = dict[str, dict[str, Any]]
"""Path of a network -> plan as plain containers and tensors."""

WAITS = "the pruning step that is due waits: what it cuts is not known before validation has run again"


def watch(
    trainer: Trainer,
    finder: Finder,
    pruners: Mapping[str, Pruner],
    due: float | None,
    loss: Loss | None,
    batch: Any = None,
) -> Observer | None:
    """Start to observe a validation epoch if a step is due after it and the networks are known.

    Args:
        trainer: in the training loop's validation.
        finder: knows the networks.
        pruners: path of a network -> its pruner.
        due: share of the whole reduction that is due; None: nothing is.
        loss: of criteria of the loss.
        batch: the first one, where that had to show the networks: it was validated already, and is once more.
    """
    if due is None or not pruners or trainer.sanity_checking:
        return None
    observer = Observer(trainer, finder.networks, pruners, loss)
    observer.start()
    if batch is not None:
        observer.batch(batch, 0, 0)
        task = trainer.lightning_module
        with isolate_rng(), harmless(task), trainer.precision_plugin.val_step_context():
            validate(task, batch)
    return observer


def check_kinds(criterion: Any, budget: Any) -> None:
    """Refuse a criterion or a budget of another kind.

    Raises:
        ConfigError: says which.
    """
    if not isinstance(criterion, Criterion):
        raise ConfigError(f"criterion must be a Criterion such as Entropy(), got {criterion!r}")
    if not isinstance(budget, Budget):
        raise ConfigError(f"budget must be a Budget such as Budget(params=0.4), got {budget!r}")


def folded(compensation: Compensation | str | None) -> Compensation | None:
    """What ``"mean"`` stands for; an object or None as it is.

    Raises:
        ConfigError: another name.
    """
    if isinstance(compensation, str) and compensation != "mean":
        raise ConfigError(f"compensation={compensation!r} must be 'mean', an object such as LeastSquares(), or None")
    return Mean() if isinstance(compensation, str) else compensation


def decide(trainer: Trainer, pruners: Mapping[str, Pruner], observations: Mapping[str, Observation], due: float) -> Plans:
    """Plan on the first process and tell the others, also of an error.

    Args:
        trainer: knows the processes.
        pruners: path of a network -> its pruner.
        observations: path of a network -> what was observed of it.
        due: share of the whole reduction that is due.

    Returns:
        The plans of the networks from which something leaves; the same on every process.

    Raises:
        ActPruneError: activations are missing or not finite, or the budget cannot be reached.
    """
    decision: dict[str, Any] = {"plans": {}, "error": None}
    if trainer.is_global_zero:
        try:
            for path, pruner in pruners.items():
                plan = pruner.plan(observations[path], due)
                if plan is not None:
                    decision["plans"][path] = plan.to_dict()
        except ActPruneError as error:
            decision["error"] = error
    decision = trainer.strategy.broadcast(decision)
    if decision["error"] is not None:
        raise decision["error"]
    return decision["plans"]


def carry_out(trainer: Trainer, hooks: CheckpointHooks, pruners: Mapping[str, Pruner], plans: Plans) -> float:
    """Cut the networks, and everything that has to follow; the seconds that it took. ``plans`` loses what is executed.

    Raises:
        SurgeryError: a cut network or a copy of it does not work; that network was put back.
    """
    began = time.perf_counter()
    hooks.remember_original()
    with torch.inference_mode(False), followed(hooks.task):
        optimizers = optimizers_of(trainer, hooks.task)
        for path in list(plans):
            pruner, copies = pruners[path], copies_of(hooks.task, path, hooks.copies)
            # one that waits in a checkpoint of an earlier version says nothing of the copies inside
            plan = mirrored(Plan.from_dict(plans[path]), pruner.model, pruner.graph.copies)
            pruner.execute(plan, optimizers=optimizers)
            del plans[path]
            for copy in copies:
                copy.follow(plan, pruner.record, optimizers)
    regroup(trainer.optimizers, pruners)
    compile_anew(hooks.task)
    rewrap(trainer)
    restart_best(trainer)
    return time.perf_counter() - began


def regroup(optimizers: Iterable[Optimizer], pruners: Mapping[str, Pruner]) -> None:
    """Give proximal optimizers the units of the networks as they are now.

    Where the criterion has a threshold, every proximal optimizer shrinks what can be removed; else only those that were given
    units, the others find the paper's by themselves. Units of modules that are not pruned stay.
    """
    proximal = [optimizer for optimizer in optimizers if isinstance(optimizer, Proximal)]
    always = any(pruner.criterion.threshold is not None for pruner in pruners.values())
    chosen = [optimizer for optimizer in proximal if always or optimizer.groups is not None]
    units = [group for pruner in pruners.values() for group in unit_groups(pruner.model, pruner.graph)] if chosen else []
    inside = {id(parameter) for pruner in pruners.values() for parameter in pruner.model.parameters()}
    for optimizer in chosen:
        others = [g for g in optimizer.groups or () if not inside & {id(piece.param) for piece in g.pieces}]
        optimizer.regroup([g for g in (optimizer.held(group) for group in [*units, *others]) if g is not None])


def go_back(trainer: Trainer, hooks: CheckpointHooks, guard: Guard) -> float:
    """Restore the network that the guard kept, after which there is none to go back to; the seconds that it took."""
    assert guard.snapshot is not None
    began = time.perf_counter()
    with torch.inference_mode(False), followed(hooks.task):
        guard.snapshot.restore(trainer, hooks)
    guard.snapshot, guard.back_at = None, trainer.global_step
    rewrap(trainer)
    return time.perf_counter() - began


def keep_last(trainer: Trainer, guard: Guard) -> None:
    """When training ends: let the last checkpoint hold the network that is left, if none was written since the way back."""
    since, guard.back_at = guard.back_at, None
    if since is not None:
        save_last_again(trainer, since)
