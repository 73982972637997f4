"""Make the plans of one step on one process, and carry them out on all: networks, averaged copies, optimizers, DDP wrapper."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import torch
from lightning import Trainer

from actprune.core.errors import ActPruneError
from actprune.core.plan import Plan
from actprune.pruning import Observation, Pruner
from actprune.training.copies import copies_of
from actprune.training.guard import Guard
from actprune.training.resume import CheckpointHooks
from actprune.training.strategy import restart_best, rewrap

Plans = dict[str, dict[str, Any]]
"""Path of a network -> plan as plain containers and tensors."""


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


def carry_out(trainer: Trainer, hooks: CheckpointHooks, pruners: Mapping[str, Pruner], plans: Mapping[str, Plan]) -> float:
    """Cut the networks, and everything that has to follow; the seconds that it took.

    Raises:
        SurgeryError: a cut network or a copy of it does not work; that network was put back.
    """
    began = time.perf_counter()
    hooks.remember_original()
    with torch.inference_mode(False):
        for path, plan in plans.items():
            copies = copies_of(hooks.task, path, hooks.copies)
            pruners[path].execute(plan, optimizers=trainer.optimizers)
            for copy in copies:
                copy.follow(plan, pruners[path].record)
    rewrap(trainer)
    restart_best(trainer)
    return time.perf_counter() - began


def go_back(trainer: Trainer, hooks: CheckpointHooks, guard: Guard) -> float:
    """Restore the network that the guard kept, after which there is none to go back to; the seconds that it took."""
    assert guard.snapshot is not None
    began = time.perf_counter()
    with torch.inference_mode(False):
        guard.snapshot.restore(trainer, hooks)
    guard.snapshot = None
    rewrap(trainer)
    return time.perf_counter() - began
