"""Pictures of one run: how accuracy moved as parameters left, and every group's width before and after."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from actprune.core.errors import ConfigError
from actprune.core.text import short
from actprune.report.figure import COLOURS, FAINT, INK, accuracy_axis, new_figure, params_axis, plain, save, tidy
from actprune.report.text import count, percent

BARS_PER_COLUMN = 36


def params_vs_accuracy(
    rows: Sequence[Mapping[str, Any]],
    path: str | os.PathLike[str],
    test_accuracy: float | None = None,
    params_before: int | None = None,
) -> Figure:
    """Draw the history of one run: parameters left against validation accuracy, epoch by epoch.

    The epochs before the first pruning step climb a vertical line; those far below everything later are cut off and
    counted below the axis, because the question is what pruning changed. A run without a pruning step is drawn over
    its epochs instead.

    Args:
        rows: one mapping per validation epoch, in order: ``epoch``, ``params`` (in force during that epoch),
            ``val_accuracy`` (share in [0, 1]), ``step`` (pruning steps made so far; 0 before the first). Rows without
            a finite ``val_accuracy`` are left out.
        path: where to write; the suffix chooses the format.
        test_accuracy: of the final network, share in [0, 1].
        params_before: of the original network; default: those of the first row, which is right unless the history
            begins after a pruning step.

    Raises:
        ConfigError: no row has a validation accuracy.
    """
    rows = [row for row in rows if row["val_accuracy"] is not None and math.isfinite(row["val_accuracy"])]
    if not rows:
        raise ConfigError("the history has 0 epochs with a validation accuracy, at least 1 is needed; validate in fit")
    pruned = rows[-1]["step"] > 0
    figure = new_figure(7.0, 4.4)
    axes = figure.add_subplot()
    tidy(axes)
    title = _draw_pruned(axes, rows, params_before or rows[0]["params"]) if pruned else _draw_unpruned(axes, rows)
    last = rows[-1]["params"] if pruned else rows[-1]["epoch"]
    if test_accuracy is not None:
        test = 100 * test_accuracy
        label = f"final network, test {test:.1f} %"
        axes.plot(last, test, "*", color=INK, markersize=9, markeredgewidth=0, label=label, zorder=7)
    accuracy_axis(axes, "accuracy, %")
    _accuracy_limits(axes, rows, test_accuracy)
    axes.set_title(title, color=INK, fontsize=11, loc="left", pad=10)
    axes.legend(frameon=True, framealpha=0.9, edgecolor="none", fontsize=8, loc="best", labelcolor=INK)
    save(figure, path)
    return figure


def widths(
    rows: Sequence[tuple[str, int, int]],  # (group, units before, units after), in the model's order
    path: str | os.PathLike[str],
) -> Figure:
    """Draw every group's width before (grey) and after (blue) as horizontal bars, the first group on top.

    More than 36 groups are set in two or three columns, so that names stay readable and the picture stays compact.

    Raises:
        ConfigError: there is no group.
    """
    if not rows:
        raise ConfigError("there are 0 groups to draw, at least 1 is needed; does the model have units that may leave?")
    columns = min(3, math.ceil(len(rows) / BARS_PER_COLUMN))
    per_column = math.ceil(len(rows) / columns)
    figure = new_figure(7.0 if columns == 1 else 5.2 * columns, 1.3 + 0.21 * max(per_column, 4))
    panels = figure.subplots(1, columns, squeeze=False)[0]
    widest = max(before for _, before, _ in rows)
    for i, axes in enumerate(panels):
        _bars(axes, rows[i * per_column : (i + 1) * per_column], per_column, widest)
    before, after = sum(before for _, before, _ in rows), sum(after for _, _, after in rows)
    title = f"units per group: {count(after)} of {count(before)} left ({percent(after / before, 0)})"
    figure.suptitle(title, color=INK, fontsize=11)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2, frameon=False, fontsize=8, labelcolor=INK)
    save(figure, path)
    return figure


def _draw_pruned(axes: Axes, rows: Sequence[Mapping[str, Any]], params_before: int) -> str:
    """Draw parameters against accuracy; return the title."""
    params = [row["params"] for row in rows]
    accuracy = [100.0 * row["val_accuracy"] for row in rows]
    _draw_epochs(axes, params, accuracy)
    steps = [i for i, row in enumerate(rows) if row["step"] > (rows[i - 1]["step"] if i else 0)]
    x, y = [params[i] for i in steps], [accuracy[i] for i in steps]
    mark: dict[str, Any] = {"markersize": 8, "markeredgecolor": "white"}
    axes.plot(x, y, "v", color=COLOURS[1], **mark, label="first epoch after a pruning step", zorder=4)
    if steps[0] > 0:
        start = steps[0] - 1
        label = f"last epoch before pruning, validation {accuracy[start]:.1f} %"
        axes.plot(params[start], accuracy[start], "s", color=INK, **mark, label=label, zorder=5)
    _draw_last(axes, params[-1], accuracy[-1])
    params_axis(axes, params, total=params_before)
    number = rows[-1]["step"]
    left = f"{short(params_before)} → {short(params[-1])} parameters ({percent(params[-1] / params_before, 0)} left)"
    return f"{left}, {number} pruning step{'s' if number > 1 else ''}"


def _draw_unpruned(axes: Axes, rows: Sequence[Mapping[str, Any]]) -> str:
    """Draw epochs against accuracy, since the parameters never change; return the title."""
    epochs = [row["epoch"] for row in rows]
    accuracy = [100.0 * row["val_accuracy"] for row in rows]
    _draw_epochs(axes, epochs, accuracy)
    _draw_last(axes, epochs[-1], accuracy[-1])
    axes.xaxis.set_major_locator(MaxNLocator(8, integer=True))
    axes.set_xlabel("epoch", color=INK, fontsize=10)
    back = any(row["step"] for row in rows)
    said = "parameters, every pruning step was taken back" if back else "parameters in every epoch, no pruning step"
    return f"{short(rows[-1]['params'])} {said}"


def _draw_epochs(axes: Axes, x: Sequence[float], accuracy: Sequence[float]) -> None:
    axes.plot(x, accuracy, color=COLOURS[0], alpha=0.35, linewidth=1.2, zorder=2)
    dot: dict[str, Any] = {"markersize": 4, "markeredgewidth": 0, "alpha": 0.6}
    axes.plot(x, accuracy, "o", color=COLOURS[0], **dot, label="epoch, validation", zorder=3)


def _draw_last(axes: Axes, x: float, accuracy: float) -> None:
    """Draw a hollow mark, so that the test accuracy shows inside it where the two agree."""
    face: dict[str, Any] = {"markerfacecolor": "white", "markeredgecolor": COLOURS[2], "markeredgewidth": 1.6}
    axes.plot(x, accuracy, "D", markersize=9, **face, label=f"last epoch, validation {accuracy:.1f} %", zorder=6)


def _accuracy_limits(axes: Axes, rows: Sequence[Mapping[str, Any]], test_accuracy: float | None) -> None:
    """Fit y to everything from the last epoch before pruning on, and say how many earlier epochs lie below.

    Without a pruning step, the second half of the epochs has to be seen.
    """
    accuracy = [100.0 * row["val_accuracy"] for row in rows]
    first = next((i for i, row in enumerate(rows) if row["step"] > 0), len(rows) // 2 + 1)
    visible = accuracy[max(first - 1, 0) :] + ([] if test_accuracy is None else [100 * test_accuracy])
    low, high = min(visible), max(visible + accuracy)
    margin = max(0.08 * (high - low), 0.3)
    floor = max(low - 2 * margin, -margin)
    axes.set_ylim(floor, high + margin)
    below = sum(value < floor for value in accuracy)
    if below:
        text = f"↓ {below} early epoch{'s' if below > 1 else ''} below the axis, from {min(accuracy):.1f} %"
        axes.annotate(
            text,
            (1.0, 0.0),
            (0, -26),
            xycoords="axes fraction",
            textcoords="offset points",
            ha="right",
            va="top",
            fontsize=8,
            color="#777777",
        )


def _bars(axes: Axes, rows: Sequence[tuple[str, int, int]], slots: int, widest: int) -> None:
    tidy(axes, grid="x")
    axes.spines["left"].set_visible(False)
    positions = range(len(rows))
    axes.barh(positions, [before for _, before, _ in rows], height=0.72, color=FAINT, label="before")
    axes.barh(positions, [after for _, _, after in rows], height=0.72, color=COLOURS[0], label="after")
    for position, (_, before, after) in zip(positions, rows, strict=True):
        text = f"{after} / {before}"
        axes.annotate(text, (before, position), (4, 0), textcoords="offset points", va="center_baseline", fontsize=7, color=INK)
    axes.set_yticks(positions, [plain(name) for name, _, _ in rows], fontsize=7.5)
    axes.tick_params(axis="y", length=0)
    axes.set_ylim(slots - 0.4, -0.6)
    axes.set_xlim(0, 1.17 * widest)
    axes.xaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10], integer=True))
    axes.set_xlabel("units", color=INK, fontsize=9)
