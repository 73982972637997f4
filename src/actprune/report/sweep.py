"""The picture of a sweep: parameters left against test accuracy, every criterion with its spread over seeds."""

from __future__ import annotations

import math
import os
import textwrap
from collections.abc import Mapping, Sequence
from itertools import cycle, islice
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from actprune.core.errors import ConfigError
from actprune.core.text import short
from actprune.report.aggregate import Row, Section, describe
from actprune.report.figure import COLOURS, INK, MARKERS, accuracy_axis, new_figure, params_axis, plain, save, tidy
from actprune.report.text import count, percent

ONE_SIZE = 1.08
"""Rows are of one size when the largest has at most this many times the parameters of the smallest."""
_LEGEND_TITLE = "mean ± standard deviation over seeds (bar, band); faint dots: single seeds"
_LABEL = 76  # characters of a line of the legend
_DASHES = ("--", ":", "-.", (0, (8, 2)), (0, (1, 4)), (0, (6, 1, 1, 1, 1, 1)), (0, (2, 6)))
"""Of the baselines of one panel; more than these repeat."""
_GAP = 0.009  # between criteria of the same size, share of the axis
_DOTS = (0.12, 0.26)  # where single seeds stand right of their mean in a panel of one size, share of a place


def sweep(rows: Sequence[Row], path: str | os.PathLike[str]) -> Figure:
    """Draw one panel per data set and model.

    Every criterion has one colour and marker: the mean over seeds with the sample standard deviation as a bar, single
    seeds as faint dots, budgets joined by a line. The baseline ``none`` is a horizontal line with its standard
    deviation as a band. When all rows of a panel have the same size they would stand on one vertical line, so each
    gets a place of its own with its size written below; in other panels criteria of the same size are moved apart by
    less than the width of a marker.

    Raises:
        ConfigError: there is no row.
    """
    if not rows:
        raise ConfigError("there are 0 rows to draw, at least 1 is needed")
    sections: dict[Section, list[Row]] = {}
    for row in rows:
        sections.setdefault(row.section, []).append(row)
    labels = sorted({row.label for row in rows if not row.is_baseline})
    marks = zip(islice(cycle(COLOURS), len(labels)), islice(cycle(MARKERS), len(labels)), strict=True)
    styles = dict(zip(labels, marks, strict=True))

    columns = min(2, len(sections))
    lines = math.ceil(len(sections) / columns)
    widest = max((len(members) for members in sections.values() if _of_one_size(members)), default=0)
    width = columns * max(7.4 if columns == 1 else 5.6, 1.3 * widest)
    legend_labels = [_fold(label) for label in labels] + [
        *{_fold(f"{row.label} (unpruned)"): None for row in rows if row.is_baseline}
    ]
    legend_columns = _legend_columns(legend_labels, width)
    legend_lines = math.ceil(sum(1 + label.count("\n") for label in legend_labels) / legend_columns)
    figure = new_figure(width, 4.6 * lines + 0.19 * (legend_lines - 1))
    panels = figure.subplots(lines, columns, squeeze=False).ravel().tolist()
    for axes, (section, members) in zip(panels, sections.items(), strict=False):
        _panel(axes, section, members, styles, _characters(width / columns - 0.75, 11))
    for axes in panels[len(sections) :]:
        axes.remove()
    _legend(figure, panels[: len(sections)], legend_columns)
    save(figure, path)
    return figure


def _of_one_size(rows: Sequence[Row]) -> bool:
    """Whether every criterion was pruned once, and all to the same size."""
    pruned = [row for row in rows if not row.is_baseline]
    sizes = [row.params.mean for row in pruned]
    return bool(sizes) and max(sizes) <= ONE_SIZE * min(sizes) and len({row.label for row in pruned}) == len(pruned)


def _panel(axes: Axes, section: Section, rows: Sequence[Row], styles: Mapping[str, tuple[str, str]], across: int) -> None:
    pruned = [row for row in rows if not row.is_baseline]
    baselines = [row for row in rows if row.is_baseline]
    for row, dashes in zip(baselines, cycle(_DASHES), strict=False):
        _draw_baseline(axes, row, dashes)
    if _of_one_size(rows):
        tidy(axes, grid="y")
        for place, row in enumerate(pruned):
            dots = (place + np.linspace(*_DOTS, len(row.points))).tolist()
            _draw(axes, [row], [place], dots, *styles[row.label])
        _name_places(axes, section, pruned)
    else:
        tidy(axes)
        sizes = [x for row in pruned for x, _ in row.points] or [section.params_before]
        params_axis(axes, sizes, total=section.params_before)
        present = [label for label in styles if any(row.label == label for row in pruned)]
        for i, label in enumerate(present):
            shift = _GAP * (i - (len(present) - 1) / 2)
            series = sorted((row for row in pruned if row.label == label), key=lambda row: row.params.mean)
            x = _beside(axes, [row.params.mean for row in series], shift)
            dots = _beside(axes, [size for row in series for size, _ in row.points], shift)
            _draw(axes, series, x, dots, *styles[label])
    accuracy_axis(axes, "test accuracy, %")
    seeds = max(len(row.seeds) for row in rows)
    title = f"{describe(section)} · {short(section.params_before)} parameters before · {seeds} seed{'s' * (seeds > 1)}"
    axes.set_title(plain(textwrap.fill(title, across)), color=INK, fontsize=11, loc="left", pad=10)


def _draw_baseline(axes: Axes, row: Row, dashes: Any) -> None:
    mean = 100 * row.accuracy.mean
    axes.axhline(mean, color=INK, linewidth=1.2, linestyle=dashes, label=plain(f"{row.label} (unpruned)"), zorder=2)
    if row.accuracy.std is not None:
        std = 100 * row.accuracy.std
        axes.axhspan(mean - std, mean + std, color=INK, alpha=0.09, linewidth=0, zorder=1)


def _draw(
    axes: Axes,
    rows: Sequence[Row],
    x: Sequence[float],  # one per row
    dots: Sequence[float],  # one per seed of each row
    colour: str,
    marker: str,
) -> None:
    seeds = [100 * accuracy for row in rows for _, accuracy in row.points]
    axes.plot(dots, seeds, "o", color=colour, alpha=0.4, markersize=4.5, markeredgewidth=0, zorder=3)
    spread = [0.0 if row.accuracy.std is None else 100 * row.accuracy.std for row in rows]
    axes.errorbar(
        x,
        [100 * row.accuracy.mean for row in rows],
        yerr=spread if any(spread) else None,
        color=colour,
        marker=marker,
        markersize=7,
        markeredgecolor="white",
        markeredgewidth=0.8,
        linewidth=1.4,
        elinewidth=1.4,
        capsize=3,
        label=plain(rows[0].label),
        zorder=4,
    )


def _name_places(axes: Axes, section: Section, rows: Sequence[Row]) -> None:
    """Write under each place which criterion stands there and what it left."""
    names = []
    for row in rows:
        name = "\n".join(textwrap.wrap(row.label, 18))
        size = f"{count(row.params.mean)} ({percent(row.params.mean / section.params_before)})"
        names.append(plain(f"{name}\n{size}"))
    axes.set_xticks(range(len(rows)), names, fontsize=8.5)
    axes.tick_params(axis="x", length=0)
    axes.set_xlim(-0.6, len(rows) - 0.4)
    axes.set_xlabel("parameters left", color=INK, fontsize=10)


def _beside(axes: Axes, params: Sequence[float], shift: float) -> list[float]:
    """Move sizes sideways by a share of the axis, logarithmic or not."""
    to_share = axes.transScale + axes.transLimits
    places = to_share.transform([(size, 1.0) for size in params])
    return to_share.inverted().transform(places + [shift, 0.0])[:, 0].tolist()


def _legend_columns(labels: Sequence[str], width: float) -> int:
    needed = [0.6 + 0.075 * max(map(len, label.split("\n"))) for label in labels]  # inches: line and gaps, text of 9 points
    return len(labels) if sum(needed) <= width else max(1, int(width / max(needed)))


def _fold(label: str) -> str:
    """A label of the legend; one that is wider than the narrowest figure goes on below."""
    return textwrap.fill(label, _LABEL)


def _characters(inches: float, points: float) -> int:
    """How many of them fit, about."""
    return int(inches / (0.0077 * points))


def _legend(figure: Figure, panels: Sequence[Axes], columns: int) -> None:
    handles = {}
    for axes in panels:
        handles.update({label: handle for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)})
    legend = figure.legend(
        list(handles.values()),
        [_fold(label) for label in handles],
        loc="outside lower center",
        ncols=columns,
        frameon=False,
        fontsize=9,
        labelcolor=INK,
        title=_LEGEND_TITLE,
        title_fontsize=8,
    )
    legend.get_title().set_color(INK)
