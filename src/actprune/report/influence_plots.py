"""Pictures of a group influence analysis: a heat map of groups, curves of accuracy, the matrix of rank correlations."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from actprune.pruning import EFFECT, RANDOM, Agreement, Influence, Removal
from actprune.report.figure import COLOURS, INK, LINES, MARKERS, accuracy_axis, new_figure, plain, save, tidy

PICTURES = ("heat_map.png", "curves.png", "curves_by_group.png", "spearman.png")
_ACROSS = 4
_LEAST_RANGE = 2.0
"""Points of accuracy that an axis spans at least."""
_ALIKE = "RdBu_r"


def draw_influence(influence: Influence, agreement: Agreement, folder: str | os.PathLike[str]) -> list[Path]:
    """Draw ``PICTURES`` into a folder."""
    paths = [Path(folder) / name for name in PICTURES]
    heat_map(influence, agreement, paths[0])
    curves(influence, paths[1])
    curves_by_group(influence, paths[2])
    matrix(agreement, paths[3])
    return paths


def heat_map(influence: Influence, agreement: Agreement, path: str | os.PathLike[str]) -> Figure:
    """Draw groups against statistics: the mean score, and its rank correlation with the effect inside the group.

    Left: every statistic's mean over the group, from the least group (0) to the greatest (1); the last column is the median
    rise of the loss when one unit is replaced. Right: Spearman's rho with that rise, over the units of the group.
    """
    names = list(influence.criteria)
    groups = influence.groups
    figure = new_figure(2.6 + 0.62 * len(names), 1.9 + 0.24 * max(len(groups), 4))
    left, right = figure.subplots(1, 2, sharey=True, width_ratios=(len(names) + 1, len(names)))
    means = np.array([[np.mean(g.scores.get(name, [math.nan])) for name in names] + [np.median(g.unit_loss)] for g in groups])
    low, high = np.fmin.reduce(means), np.fmax.reduce(means)  # NaN where a statistic scored no group
    scaled = (means - low) / np.where(high > low, high - low, 1)
    one = left.imshow(scaled, cmap="viridis", vmin=0, vmax=1, aspect="auto")
    _label(left, [*names, "loss of a unit"], [group.name for group in groups])
    left.set_title("mean of the statistic", color=INK, fontsize=9, loc="left")
    effect = list(agreement.names).index(EFFECT)
    unknown = [[math.nan] * len(agreement.names)] * len(agreement.names)
    rows = [agreement.by_group.get(group.name, unknown)[effect] for group in groups]
    rhos = np.array([[row[list(agreement.names).index(name)] for name in names] for row in rows], dtype=float)
    two = right.imshow(rhos, cmap=_ALIKE, vmin=-1, vmax=1, aspect="auto")
    _label(right, names, None)
    right.set_title("rho with the effect", color=INK, fontsize=9, loc="left")
    for image, axes, label in ((one, left, "least to greatest group"), (two, right, "Spearman's rho")):
        bar = figure.colorbar(image, ax=axes, location="bottom", shrink=0.6, aspect=30)
        bar.set_label(label, fontsize=8, color=INK)
        bar.ax.tick_params(labelsize=7, colors=INK)
    save(figure, path)
    return figure


def curves(influence: Influence, path: str | os.PathLike[str]) -> Figure:
    """Draw accuracy against the share of every group that is replaced: the lowest, and the highest, by each criterion.

    The legend begins with the criterion that keeps most when the lowest are replaced, on average over the shares.
    """
    figure = new_figure(9.6, 4.4)
    panels = figure.subplots(1, 2, sharey=True)
    for axes, end in zip(panels, ("lowest", "highest"), strict=True):
        _draw(axes, influence, influence.whole, end)
        axes.set_title(f"the {end} of every group are their means", color=INK, fontsize=10, loc="left")
        axes.set_xlabel("share of every group, %", color=INK, fontsize=10)
    accuracy_axis(panels[0], "accuracy, %")
    kept: dict[str, list[float]] = {plain(name): [] for name in influence.criteria}
    for removal in influence.whole:
        if removal.end != "highest":
            kept[plain(removal.criterion)].append(removal.accuracy)
    _legend(figure, panels[0], "outside right center", 1, lambda label: -float(np.mean(kept[label] or [0.0])))
    save(figure, path)
    return figure


def curves_by_group(influence: Influence, path: str | os.PathLike[str]) -> Figure:
    """Draw the same for the lowest units of one group at a time, each on an axis of its own: groups differ by far."""
    across = min(_ACROSS, len(influence.groups))
    down = math.ceil(len(influence.groups) / across)
    figure = new_figure(0.8 + 2.5 * across, 0.9 + 1.8 * down)
    panels = figure.subplots(down, across, sharex=True, squeeze=False)
    for axes, group in zip(panels.flat, influence.groups, strict=False):
        _draw(axes, influence, group.removals, "lowest")
        axes.set_title(plain(f"{group.name} ({group.size})"), color=INK, fontsize=8, loc="left", pad=3)
        low, high = axes.get_ylim()
        axes.set_ylim(min(low, high - _LEAST_RANGE), high)
        axes.yaxis.set_major_locator(MaxNLocator(4, steps=[1, 2, 5, 10]))
    for axes in list(panels.flat)[len(influence.groups) :]:
        axes.set_axis_off()
    for axes in list(panels.flat)[:-across][len(influence.groups) - across :]:
        axes.tick_params(labelbottom=True)  # nothing is drawn below
    figure.supxlabel("share of the group, lowest first, %", color=INK, fontsize=9)
    figure.supylabel("accuracy, %", color=INK, fontsize=9)
    _legend(figure, panels[0][0], "outside upper center", max(2, 3 * across // 2))
    save(figure, path)
    return figure


def matrix(agreement: Agreement, path: str | os.PathLike[str]) -> Figure:
    """Draw the rank correlation of every two, in hundredths; the effect comes first."""
    size = 1.9 + 0.36 * len(agreement.names)
    figure = new_figure(size + 0.7, size)
    axes = figure.add_subplot()
    values = np.array(agreement.mean, dtype=float)
    image = axes.imshow(values, cmap=_ALIKE, vmin=-1, vmax=1)
    _label(axes, agreement.names, agreement.names)
    for (i, j), value in np.ndenumerate(values):
        text = "·" if math.isnan(value) else str(round(100 * value))
        axes.text(j, i, text, ha="center", va="center", fontsize=6.5, color="white" if abs(value) > 0.6 else INK)
    groups = max(map(max, agreement.n_groups))
    title = f"Spearman's rho in hundredths,\nmean over {groups} group{'s' * (groups != 1)}"
    axes.set_title(title, color=INK, fontsize=9, loc="left")
    figure.colorbar(image, shrink=0.7).ax.tick_params(labelsize=7, colors=INK)
    save(figure, path)
    return figure


def _label(axes: Axes, columns: Sequence[str], rows: Sequence[str] | None) -> None:
    axes.set_xticks(range(len(columns)), [plain(name) for name in columns], rotation=60, ha="right", rotation_mode="anchor")
    if rows is not None:
        axes.set_yticks(range(len(rows)), [plain(name) for name in rows])
    axes.tick_params(labelsize=7, colors=INK, length=0)
    axes.spines[:].set_visible(False)


def _draw(axes: Axes, influence: Influence, removals: Sequence[Removal], end: str) -> None:
    tidy(axes)
    for number, name in enumerate(influence.criteria):
        wanted = "random" if name == RANDOM else end
        points = sorted((r.share, r.accuracy) for r in removals if r.criterion == name and r.end == wanted)
        x = [0.0, *(100 * share for share, _ in points)]
        y = [100 * influence.accuracy, *(100 * accuracy for _, accuracy in points)]
        mark, colour = MARKERS[number % len(MARKERS)], COLOURS[number % len(COLOURS)]
        lines = LINES[number // len(COLOURS) % len(LINES)]
        style: dict[str, Any] = {"color": colour, "linewidth": 1.1, "linestyle": lines}
        if name == RANDOM:
            style = {"color": INK, "linewidth": 2.2, "linestyle": "--"}
        axes.plot(x, y, marker=mark, markersize=4, markeredgewidth=0, label=plain(name), **style)


def _legend(figure: Figure, axes: Axes, place: Any, columns: int, order: Callable[[str], Any] | None = None) -> None:
    lines = dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
    labels = sorted(lines, key=order) if order is not None else list(lines)
    figure.legend(
        [lines[label] for label in labels], labels, loc=place, ncols=columns, frameon=False, fontsize=7, labelcolor=INK
    )
