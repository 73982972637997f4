"""What pruning did, as lines for the console, rows for loggers and entries for a summary."""

from __future__ import annotations

import math
import sys
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from lightning import LightningModule, Trainer

from actprune.core.budget import Budget
from actprune.core.plan import Plan
from actprune.core.text import short
from actprune.pruning import Pruner
from actprune.training.guard import Guard
from actprune.training.logging import log_row
from actprune.training.timing import epochs_trained


def sizes(pruners: Iterable[Pruner]) -> dict[str, int]:
    """Steps so far, parameters and multiply-adds of all pruned networks together."""
    pruners = list(pruners)
    return {
        "step": max((len(pruner.record.steps) for pruner in pruners), default=0),
        "params": sum(pruner.params for pruner in pruners),
        "macs": sum(pruner.macs for pruner in pruners),
    }


def step_event(
    epoch: int,
    pruners: Mapping[str, Pruner],
    plans: Mapping[str, Plan],
    before: Mapping[str, int],
    seconds: Mapping[str, float],
) -> dict[str, Any]:
    """One pruning step: when, what was cut where, sizes before and after, and what it took.

    Args:
        epoch: the epoch before which it was executed, from 0.
        pruners: path of a network -> its pruner, after the step.
        plans: path of a network -> what was executed.
        before: ``sizes`` before the step.
        seconds: time for observing (the whole observed validation epoch), planning and cutting.
    """
    after = sizes(pruners.values())
    cut = {}
    for path, plan in plans.items():
        widths = pruners[path].record.widths
        for group, n in plan.groups.items():
            cut[f"{path}.{group}" if len(pruners) > 1 else group] = [widths[group][1] + n, widths[group][1]]
    return {
        "epoch": epoch,
        "step": after["step"],
        "params": [before["params"], after["params"]],
        "macs": [before["macs"], after["macs"]],
        "widths": cut,
        "seconds": {name: round(value, 4) for name, value in seconds.items()},
    }


def step_line(event: Mapping[str, Any], pruners: Iterable[Pruner]) -> str:
    """The same for the console, within 100 columns: what is left, in numbers and as shares of the whole."""
    pruners = list(pruners)
    whole = {unit: sum(getattr(pruner, f"{unit}_before") for pruner in pruners) for unit in ("params", "macs")}
    n = len(event["widths"])
    return (
        f"pruning step {event['step']}, before epoch {event['epoch'] + 1}: "
        f"params {event['params'][1]:,} ({event['params'][1] / whole['params']:.1%}), "
        f"MACs {short(event['macs'][1])} ({event['macs'][1] / whole['macs']:.1%}), "
        f"{n} group{'s' if n != 1 else ''}, {event['seconds']['cutting']:.1f} s"
    )


def say(task: LightningModule, line: str) -> None:
    """Print, within 100 columns."""
    task.print(textwrap.fill(line, 100, break_long_words=False, break_on_hyphens=False))


def measured(
    task: LightningModule, logged: Mapping[str, Any], own: str | None, monitor: str | None, first: bool
) -> dict[str, float]:
    """The monitored metric by its name, if validation logged it.

    Args:
        task: says so on the console.
        logged: what this validation logged.
        own: the name that the user gave, if any: the console says once, after the first validation, that nothing has it.
        monitor: the name that is followed.
        first: whether this is the first validation.
    """
    if monitor is not None and monitor in logged:
        return {monitor: float(logged[monitor])}
    if own is not None and first:
        known = ", ".join(sorted(map(str, logged))) or "nothing"
        say(task, f"monitor={own!r} was not logged by validation and is left out; it logged {known}")
    return {}


def tell(trainer: Trainer, event: Mapping[str, Any], line: str) -> None:
    """Print a step, and send it to every logger: widths of what was cut, and the times."""
    say(trainer.lightning_module, line)
    metrics: dict[str, float] = {f"surgery/width/{group}": after for group, (_, after) in event["widths"].items()}
    metrics |= {f"surgery/{name}_seconds": value for name, value in event["seconds"].items()}
    for logger in trainer.loggers:
        logger.log_metrics({**metrics, "epoch": event["epoch"]}, step=trainer.global_step)


def log_gauges(trainer: Trainer, task: LightningModule, size: Mapping[str, int] | None) -> None:
    """Send the peak of memory to every logger, and sizes in an epoch that had no validation to send them."""
    metrics = {"memory/peak_mib": peak_memory(task)}
    metrics |= {f"prune/{name}": value for name, value in (size or {}).items()}
    for logger in trainer.loggers:
        logger.log_metrics({**metrics, "epoch": trainer.current_epoch}, step=max(trainer.global_step - 1, 0))


def unseen(history: Sequence[Mapping[str, Any]], events: Sequence[Mapping[str, Any]]) -> bool:
    """Whether the network was cut, or put back, after the last validation: what that measured is of another network."""
    return bool(events) and (not history or events[-1]["epoch"] > history[-1]["epoch"])


def close(
    trainer: Trainer,
    history: list[dict[str, Any]],
    events: Sequence[Mapping[str, Any]],
    budget: Budget,
    pruners: Iterable[Pruner],
    guard: Guard | None,
) -> dict[str, str]:
    """End a run: sizes of a network that no validation saw go to the history and to every logger; say ``why`` it stopped."""
    pruners = list(pruners)
    if unseen(history, events):
        history.append({"epoch": epochs_trained(trainer) - 1, **sizes(pruners)})
        log_row(trainer, history[-1], step=trainer.global_step)  # beside what was logged last, which is of another network
    stopped = why(trainer, budget, pruners, guard, bool(history))
    if stopped["reason"] != "budget":
        say(trainer.lightning_module, stopped["message"])
    return stopped


def why(trainer: Trainer, budget: Budget, pruners: Iterable[Pruner], guard: Guard | None, validated: bool) -> dict[str, str]:
    """Why pruning stopped: ``reason`` is budget, metric, threshold or epochs; ``message`` says it in a sentence."""
    pruners = list(pruners)
    thresholds = [pruner.criterion.threshold for pruner in pruners if pruner.criterion.threshold is not None]
    if thresholds and validated and (guard is None or not guard.lost):
        left = sum(getattr(p, budget.unit) for p in pruners) / sum(getattr(p, f"{budget.unit}_before") for p in pruners)
        scored = f"at every step the units left that scored at most {max(thresholds):.4g}"
        limit = f"{left:.1%} of the {budget.unit} remain, the limit was {budget.share:.1%}"
        return {"reason": "threshold", "message": f"{scored}; {limit}"}
    if pruners and all(getattr(pruner, budget.unit) <= pruner.target(1.0) for pruner in pruners):
        return {"reason": "budget", "message": f"the budget {budget.unit}={budget.share:g} was reached"}
    missed = f"the budget {budget.unit}={budget.share:g} was not reached"
    if guard is not None and guard.lost:
        return {"reason": "metric", "message": f"{guard.verdict()} at {guard.lost[-1]['share']:.1%} of the reduction; {missed}"}
    ended = f"training ended at epoch {trainer.current_epoch} of {trainer.max_epochs}, before the last step"
    if not validated:
        options = ("val_check_interval", "check_val_every_n_epoch", "max_steps")
        given = ", ".join(f"{name}={getattr(trainer, name)}" for name in options)
        ended = f"{ended.rpartition(',')[0]} and nothing was validated ({given}), so no step was decided"
    return {"reason": "epochs", "message": f"{ended}; {missed}"}


def broke_after_cut(event: Mapping[str, Any]) -> str:
    """What to look at when training fails right after a step."""
    cut = ", ".join(event["widths"]) or "nothing"
    return (
        f"training broke in the first epoch after pruning step {event['step']}, which cut {cut}. "
        "If the message below is about a size: training runs the network otherwise than validation does (name the networks to "
        "prune: modules=[...]), or another module follows its weights (a momentum encoder: copies={'copy': 'original'})"
    )


def peak_memory(task: LightningModule) -> float:
    """Largest memory so far in MiB: what torch held on the GPU, or the process's resident set (NaN on Windows)."""
    if task.device.type == "cuda":
        return torch.cuda.max_memory_allocated(task.device) / 2**20
    if sys.platform == "win32":
        return math.nan
    import resource

    unit = 1 if sys.platform == "darwin" else 2**10  # bytes there, KiB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20
