"""The console: at most 100 columns, whatever the terminal."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from lightning.pytorch.utilities.rank_zero import rank_zero_only
from omegaconf import DictConfig, OmegaConf
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

WIDTH = 100

_FIRST = ("task", "seed", "data", "model", "pruner", "optimizer", "scheduler", "trainer")
_LOGGED = ("train", "prune")
_OF_TASKS = ("analyze", "capacity")
_NOT_ANALYZED = ("pruner", "optimizer", "scheduler", "trainer", "module", "callbacks", "ckpt_path", "export", "optimize")
_INSIDE = ("schedule", "compensation", "budget")  # shown where they are used: in the pruner


def console() -> Console:
    """A console on the present standard output, at most ``WIDTH`` columns wide; brackets in a text are no markup."""
    probe = Console(file=sys.stdout)
    return Console(file=sys.stdout, width=min(WIDTH, probe.width) if probe.is_terminal else WIDTH, markup=False)


def print_folder(folder: str | Path, console: Console, before: str = "") -> None:
    """Say where everything is, unbroken so that it can be copied; ``before``: what the line begins with."""
    console.print(f"{before}everything is in", soft_wrap=True)
    console.print(str(folder), soft_wrap=True, highlight=False)


@rank_zero_only
def print_config(config: DictConfig) -> None:
    """Print a resolved configuration, each group as the call that will be made of it; without what the task does not read."""
    table = Table(box=box.SIMPLE, show_header=False, title="configuration", title_justify="left", pad_edge=False)
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    folder = str(config.paths.output_dir)
    task = config.task.name
    unread = {*_OF_TASKS, *(_NOT_ANALYZED if task == "analyze" else ()), *(() if task in _LOGGED else ("logger",))} - {task}
    for name in (*_FIRST, *(str(name) for name in config if name not in (*_FIRST, *_INSIDE))):
        if name in unread:
            continue
        spelt = _spell(config[name])
        table.add_row(name, Text(spelt if name == "paths" else spelt.replace(folder, "OUTPUT_DIR")))
    console().print(table)


def _spell(node: Any) -> str:
    if OmegaConf.is_dict(node):
        target = str(node.get("_target_", "")).rpartition(".")[2]
        inside = ", ".join(f"{key}={_spell(value)}" for key, value in node.items() if not str(key).startswith("_"))
        return f"{target}({inside})"
    if OmegaConf.is_list(node):
        return f"[{', '.join(_spell(value) for value in node)}]"
    return "null" if node is None else str(getattr(node, "name", node))
