"""Tables for the console (at most 100 columns), Markdown and CSV."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich import box
from rich.console import Group, RenderableType
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from actprune.core.files import atomic_path
from actprune.core.text import short
from actprune.report.aggregate import Row, Section, Spread, describe
from actprune.report.runs import Problem
from actprune.report.sheet import write_rows
from actprune.report.text import change, count, percent, points

MAX_GROUPS = 24
"""Group widths printed in full; longer lists keep their first and last ones."""
SPREAD = "± is the sample standard deviation over seeds (ddof 1)"
DIFFERENCE = "vs. none is the mean difference to the unpruned baseline, over the seeds both have, in points"

_ABSENT = "-"


def before_after(
    summary: Mapping[str, Any],
    widths: Sequence[tuple[str, int, int]],  # (group, units before, units after)
) -> RenderableType:
    """Show what pruning did to one network.

    Args:
        summary: the run's summary; ``params_before``, ``params_after``, ``macs_before``, ``macs_after`` are required,
            ``val_accuracy`` and ``test_accuracy`` (shares in [0, 1]) are shown when present, with
            ``val_accuracy_before`` and ``test_accuracy_before`` beside them when those are there too.
        widths: every group with its width before and after, in the model's order.
    """
    totals = _table("before", "after", "change", title=_title(summary))
    for name, unit in (("params", "parameters"), ("macs", "MACs per sample")):
        before, after = summary[f"{name}_before"], summary[f"{name}_after"]
        totals.add_row(unit, count(before), count(after), change(before, after))
    for name in ("val", "test"):
        after = summary.get(f"{name}_accuracy")
        if after is not None:
            before = summary.get(f"{name}_accuracy_before")
            difference = _ABSENT if before is None else f"{points(after - before)} points"
            label = "validation accuracy" if name == "val" else "test accuracy"
            totals.add_row(label, _ABSENT if before is None else percent(before, 2), percent(after, 2), difference)
    if not widths:
        return totals
    return Group(totals, Text(), _widths_table(widths))


def comparison(
    rows: Sequence[Row],
    problems: Sequence[Problem] = (),
    notes: Sequence[str] = (),
) -> RenderableType:
    """Show rows of runs, one table per data set and model, with everything that could not be compared below."""
    parts: list[RenderableType] = []
    for section, members in _sections(rows):
        header, cells = _cells(members, config_apart=False)
        table = _table(*header[1:], title=_headline(section), first=header[0])
        for i, (row, line) in enumerate(zip(members, cells, strict=True)):
            after = members[min(i + 1, len(members) - 1)]
            new_block = (row.is_baseline, row.config, row.budget) != (after.is_baseline, after.config, after.budget)
            table.add_row(*map(Text, line), style="dim" if row.is_baseline else None, end_section=new_block)
        parts += [table, Text()]
    if rows:
        parts.append(Text("\n".join(_footnotes(rows)), style="dim"))
    parts += [Text(f"note: {note}", style="yellow") for note in notes]
    parts += [Text(f"not compared: {_problem(problem)}", style="red") for problem in problems]
    return Group(*parts)


def write_markdown(
    rows: Sequence[Row],
    path: str | os.PathLike[str],
    problems: Sequence[Problem] = (),
    notes: Sequence[str] = (),
    picture: str | None = None,
) -> None:
    """Write the same as :func:`comparison` as Markdown, with ``picture`` (a relative path) on top."""
    lines = ["# Comparison", ""]
    if picture is not None:
        lines += [f"![parameters left against test accuracy]({picture})", ""]
    for section, members in _sections(rows):
        header, cells = _cells(members, config_apart=True)
        lines += [f"## {_headline(section)}", ""]
        lines += [_markdown_row(header), "|" + " --- |" + " ---: |" * (len(header) - 1)]
        lines += [_markdown_row(line) for line in cells] + [""]
    lines += [" ".join(_footnotes(rows)), ""]
    if notes:
        lines += ["## Notes", "", *(f"- {note}" for note in notes), ""]
    if problems:
        lines += ["## Not compared", "", *(f"- {_problem(problem)}" for problem in problems), ""]
    with atomic_path(path) as temporary:
        temporary.write_text("\n".join(lines), encoding="utf-8")


def write_csv(rows: Iterable[Row], path: str | os.PathLike[str]) -> None:
    """Write every number of the rows in full precision; accuracies and differences are shares in [0, 1]."""
    write_rows(path, [_record(row) for row in rows])


def _title(summary: Mapping[str, Any]) -> str:
    known = [f"{key} {summary[key]}" for key in ("criterion", "seed") if summary.get(key) is not None]
    return " · ".join(["before and after", *known])


def _table(*numbers: str, title: str, first: str = "") -> Table:
    table = Table(
        box=box.SIMPLE_HEAD,
        title=Text(title, style="bold"),
        title_justify="left",
        pad_edge=False,
        padding=(0, 1, 0, 0),
    )
    table.add_column(first, overflow="fold", max_width=48)
    for name in numbers:
        table.add_column(name, justify="right", no_wrap=True)
    return table


def _widths_table(widths: Sequence[tuple[str, int, int]]) -> Table:
    table = _table("before", "after", "left", title=f"units per group · {len(widths)} groups", first="group")
    table.add_column("", width=20)
    half = MAX_GROUPS // 2
    elided = widths[half:-half] if len(widths) > MAX_GROUPS else ()
    head, tail = (widths[:half], widths[-half:]) if elided else (widths, ())
    for row in head:
        table.add_row(*_width_row(*row))
    if elided:
        table.add_row(*_width_row(f"… {len(elided)} more groups", *_sums(elided)), style="dim")
    for row in tail:
        table.add_row(*_width_row(*row))
    table.add_section()
    table.add_row(*_width_row("total", *_sums(widths)), style="bold")
    return table


def _sums(widths: Sequence[tuple[str, int, int]]) -> tuple[int, int]:
    return sum(before for _, before, _ in widths), sum(after for _, _, after in widths)


def _width_row(name: str, before: int, after: int) -> tuple[RenderableType, ...]:
    bar = ProgressBar(total=before, completed=after, width=20, style="bright_black", complete_style="cyan")
    return Text(name), count(before), count(after), percent(after / before, 0), bar


def _sections(rows: Iterable[Row]) -> list[tuple[Section, list[Row]]]:
    sections: dict[Section, list[Row]] = {}
    for row in rows:
        sections.setdefault(row.section, []).append(row)
    return list(sections.items())


def _headline(section: Section) -> str:
    return f"{describe(section)} · before: {count(section.params_before)} parameters, {short(section.macs_before)} MACs"


def _cells(rows: Sequence[Row], config_apart: bool) -> tuple[list[str], list[list[str]]]:
    """Header and one line of text per row; columns that nobody fills are left out.

    A config has a column of its own, or stands below its criterion where the width is limited.
    """
    lines = [
        {
            "criterion": row.criterion if config_apart else "\n".join((row.criterion, *row.config)),
            "config": " ".join(row.config) if config_apart else "",
            "budget": row.budget,
            "params left": count(row.params.mean),
            "left": percent(row.params.mean / row.section.params_before),
            "MACs left": percent(row.macs.mean / row.section.macs_before),
            "test accuracy": _accuracy(row.accuracy),
            "vs. none": "" if row.difference is None else _points(row.difference),
            "n": str(len(row.seeds)),
        }
        for row in rows
    ]
    header = [name for name in lines[0] if any(line[name] for line in lines)]
    return header, [[line[name] for name in header] for line in lines]


def _footnotes(rows: Sequence[Row]) -> list[str]:
    """What the columns mean that are there."""
    compared = any(row.difference is not None for row in rows)
    return [f"Accuracies in %; {SPREAD}.", *([f"{DIFFERENCE}."] if compared else [])]


def _accuracy(spread: Spread) -> str:
    return f"{100 * spread.mean:.2f}" + ("" if spread.std is None else f" ± {100 * spread.std:.2f}")


def _points(spread: Spread) -> str:
    return points(spread.mean) + ("" if spread.std is None else f" ± {100 * spread.std:.2f}")


def _problem(problem: Problem) -> str:
    asked = f" ({' '.join(problem.overrides)})" if problem.overrides else ""
    return f"{problem.path}{asked}: {problem.reason}"


def _markdown_row(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _record(row: Row) -> dict[str, Any]:
    def both(name: str, spread: Spread | None) -> dict[str, float | None]:
        return {
            f"{name}_mean": None if spread is None else spread.mean,
            f"{name}_std": None if spread is None else spread.std,
        }

    section = row.section
    return {
        "data": section.data,
        "model": section.model,
        "criterion": row.criterion,
        "budget": row.budget,
        "config": " ".join(row.config),
        "n": len(row.seeds),
        "seeds": " ".join(map(str, row.seeds)),
        "params_before": section.params_before,
        **both("params_after", row.params),
        "params_left": row.params.mean / section.params_before,
        "macs_before": section.macs_before,
        **both("macs_after", row.macs),
        "macs_left": row.macs.mean / section.macs_before,
        **both("test_accuracy", row.accuracy),
        **both("difference", row.difference),
        "difference_n": 0 if row.difference is None else row.difference.n,
        **both("val_accuracy", row.val_accuracy),
        **both("seconds", row.seconds),
    }
