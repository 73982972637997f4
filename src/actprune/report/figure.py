"""What every picture shares: palette, canvas, ticks, and saving.

Pictures are ``matplotlib.figure.Figure`` objects on an Agg canvas: no pyplot, hence no global state, no window and no
figure that stays open. Colours are those of Okabe and Ito (2008), which stay apart under every common colour blindness;
criteria differ by marker as well, and where there are many by the kind of line.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter, NullLocator, ScalarFormatter

from actprune.core.files import atomic_path
from actprune.core.text import short

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8C510A")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">")  # 9 and 7 share no factor: 63 combinations
LINES: tuple[Any, ...] = ("-", (0, (4, 1)), (0, (1, 1)), (0, (5, 1, 1, 1)))
"""Of the first lines of each colour, of the second ones, and so on."""
INK = "#333333"
FAINT = "#C8C8C8"
DPI = 160
LOG_FROM = 8.0
"""Ratio of the largest to the smallest parameter count from which the axis is logarithmic."""


def new_figure(width: float, height: float) -> Figure:
    """Make an empty figure of the given size in inches, laid out automatically when drawn."""
    figure = Figure(figsize=(width, height), dpi=DPI, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def tidy(axes: Axes, grid: Literal["both", "x", "y"] = "both") -> None:
    """Take away what carries no information and put a faint grid behind the data."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(INK)
    axes.tick_params(colors=INK, labelsize=9, length=3)
    axes.grid(True, axis=grid, color="#E6E6E6", linewidth=0.7)
    axes.set_axisbelow(True)


def params_axis(axes: Axes, values: Sequence[float], total: float) -> None:
    """Make x an axis of parameter counts, with the share of ``total`` on top.

    Args:
        axes: where to draw; y must be drawn already or keep its own limits.
        values: everything that has to be visible on x.
        total: parameters of the original model.
    """
    low, high = min(values), max(values)
    logarithmic = high / low >= LOG_FROM
    if logarithmic:
        axes.set_xscale("log")
        margin = (high / low) ** 0.06
        axes.set_xlim(low / margin, high * margin)
        subs = (1.0, 2.0, 5.0) if high / low < 200 else (1.0,)
        axes.xaxis.set_major_locator(LogLocator(subs=subs, numticks=12))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_minor_formatter(NullFormatter())
    else:
        margin = 0.08 * (high - low) or 0.1 * high
        axes.set_xlim(max(0.0, low - margin), high + margin)
        axes.xaxis.set_major_locator(MaxNLocator(7, steps=[1, 2, 2.5, 5, 10]))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: short(value, 5)))
    axes.set_xlabel("parameters left", color=INK, fontsize=10)

    top = axes.secondary_xaxis(
        "top", functions=(lambda x: np.multiply(x, 100 / total), lambda share: np.multiply(share, total / 100))
    )
    top.spines["top"].set_visible(False)
    top.tick_params(colors="#777777", labelsize=8, length=2)
    top.set_xlabel("share of the original, %", color="#777777", fontsize=8)
    if logarithmic:
        low_share, high_share = (100 * x / total for x in axes.get_xlim())
        shares = [s for s in _readable(low_share, high_share) if low_share <= s <= high_share]
        top.set_xticks(shares, [f"{share:g}" for share in shares])
        top.xaxis.set_minor_locator(NullLocator())
    else:
        top.xaxis.set_major_locator(MaxNLocator(7, steps=[1, 2, 2.5, 5, 10]))


def accuracy_axis(axes: Axes, label: str) -> None:
    """Make y an axis of accuracies in percent."""
    axes.yaxis.set_major_locator(MaxNLocator(8, steps=[1, 2, 2.5, 5, 10]))
    axes.yaxis.set_major_formatter(ScalarFormatter(useOffset=False))
    axes.set_ylabel(label, color=INK, fontsize=10)


def plain(text: str) -> str:
    """Keep matplotlib from reading dollar signs as mathematics."""
    return text.replace("$", r"\$")


def save(figure: Figure, path: str | os.PathLike[str]) -> None:
    """Draw the figure and write it whole or not at all; the suffix chooses the format."""
    with atomic_path(path) as temporary:
        figure.savefig(temporary)


def _readable(low: float, high: float) -> list[float]:
    decades = np.arange(np.floor(np.log10(low)), np.ceil(np.log10(high)) + 1)
    return [float(f"{step * 10.0**decade:.6g}") for decade in decades for step in (1, 2, 5)]
