"""A tree of run directories to one table and one picture."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from rich.console import Group, RenderableType
from rich.text import Text

from actprune.core.errors import ConfigError
from actprune.report.aggregate import Row, aggregate
from actprune.report.runs import SUMMARY, Problem, read_runs
from actprune.report.sweep import sweep
from actprune.report.tables import comparison, write_csv, write_markdown


@dataclass(frozen=True)
class Comparison:
    """What was found in a tree of runs, and where it was written."""

    rows: tuple[Row, ...]
    """One per section, criterion, budget and config."""
    problems: tuple[Problem, ...]
    """Run directories that are not in the rows, paths relative to the tree."""
    notes: tuple[str, ...]
    """What makes the rows less comparable than they look."""
    n_runs: int
    """Run directories that are in the rows."""
    csv: Path
    markdown: Path
    picture: Path

    def __rich__(self) -> RenderableType:
        """Show the tables, then everything that was left out, then the files."""
        left_out = f", {len(self.problems)} not compared" if self.problems else ""
        files = [Text(f"wrote {path}", style="dim") for path in (self.csv, self.markdown, self.picture)]
        head = Text(f"{self.n_runs} runs{left_out}\n")
        return Group(head, comparison(self.rows, self.problems, self.notes), Text(), *files)


def compare(directory: str | os.PathLike[str], out: str | os.PathLike[str] | None = None) -> Comparison:
    """Compare every run in a tree, e.g. a Hydra sweep's directory.

    Writes ``comparison.csv``, ``comparison.md`` and ``comparison.png``.

    Args:
        directory: the tree; every directory in it with a ``summary.json`` is a run, one with ``.hydra`` and no summary
            a job that failed, or of a task that has results of its own.
        out: where to write; default: ``directory``.

    Raises:
        ConfigError: there is no such directory, or no readable summary in it.
        OSError: ``out`` cannot be written.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise ConfigError(f"{directory} is not a directory; name the directory of a sweep or of a run")
    runs, problems = read_runs(directory)
    problems = [replace(problem, path=problem.path.relative_to(directory)) for problem in problems]
    if not runs:
        raise ConfigError(_nothing(directory, problems))
    rows, notes = aggregate(runs)
    target = directory if out is None else Path(out)
    result = Comparison(
        rows=tuple(rows),
        problems=tuple(problems),
        notes=tuple(notes),
        n_runs=len(runs),
        csv=target / "comparison.csv",
        markdown=target / "comparison.md",
        picture=target / "comparison.png",
    )
    write_csv(rows, result.csv)
    sweep(rows, result.picture)
    write_markdown(rows, result.markdown, problems, notes, picture=result.picture.name)
    return result


def _nothing(directory: Path, problems: Sequence[Problem]) -> str:
    if not problems:
        return (
            f"no {SUMMARY} under {directory}, at least 1 is needed; name the directory of a sweep or of a run that has finished"
        )
    listed = "".join(f"\n  {problem.path}: {problem.reason}" for problem in problems)
    return f"0 of {len(problems)} runs under {directory} can be compared, at least 1 is needed:{listed}"
