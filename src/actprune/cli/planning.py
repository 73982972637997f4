"""``task=plan``: what would leave, and when, without training anything."""

from __future__ import annotations

from pathlib import Path

from lightning import LightningDataModule, LightningModule, Trainer
from rich import box
from rich.table import Table
from rich.text import Text

from actprune.cli.console import console
from actprune.core.errors import ConfigError
from actprune.pruning import Pruner
from actprune.pruning.batches import expected_samples, observe_pairs, pairs_of
from actprune.report import before_after, structure
from actprune.training.callback import SETTINGS, PruningCallback
from actprune.training.timing import Timetable

GROUPS = "groups.svg"


def print_plan(
    data: LightningDataModule, module: LightningModule, pruning: PruningCallback | None, trainer: Trainer, folder: Path
) -> None:
    """Observe the untrained network once and print graph, schedule and the plan for the whole budget; draw the groups.

    Raises:
        ActPruneError: the network cannot be pruned as asked.
    """
    if pruning is None:
        raise ConfigError("task=plan has nothing to plan with pruner=none; choose a criterion, e.g. pruner=entropy")
    data.prepare_data()
    data.setup("fit")
    batches = data.val_dataloader()
    example = next(iter(batches))[0][:1]
    net = module.get_submodule("net")
    pruner = Pruner(net, example, seed=0, **{name: getattr(pruning, name) for name in SETTINGS})
    out = console()
    out.print(str(pruner.graph), highlight=False)
    structure(pruner.graph, folder / GROUPS, type(net).__name__)
    out.print(_timetable(pruning, pruner, trainer))
    plan = pruner.plan(observe_pairs(pruner, pairs_of(batches, example), expected=expected_samples(batches, example)), 1.0)
    gone = {} if plan is None else plan.groups
    sizes = {
        "params_before": pruner.params,
        "params_after": pruner.params if plan is None else plan.params_after,
        "macs_before": pruner.macs,
        "macs_after": pruner.macs if plan is None else plan.macs_after,
    }
    out.print(before_after(sizes, [(g, before, before - gone.get(g, 0)) for g, before, _ in pruner.widths()]))
    out.print("Scores are those of the untrained network: sizes are what the budget gives, widths will differ.")
    out.print(f"Who shares a width with whom: {folder / GROUPS}", soft_wrap=True, highlight=False)


def _timetable(pruning: PruningCallback, pruner: Pruner, trainer: Trainer) -> Table:
    """When the run would take which step, by the epochs in which it validates; counted as its own lines count them."""
    budget, timetable = pruning.budget, Timetable.of(pruning.schedule, trainer)
    total = getattr(pruner, f"{budget.unit}_before")
    title = Text("schedule", style="bold")
    table = Table(
        "step", "before epoch", "reduction due", f"{budget.unit} left", box=box.SIMPLE_HEAD, title=title, title_justify="left"
    )
    for number, (epoch, due) in enumerate(timetable.taken(), start=1):
        left = budget.due(due)
        table.add_row(str(number), str(epoch + 2), f"{due:.1%}", f"{left * total:,.0f} ({left:.1%})")
    return table
