"""Who shares a width with whom: the groups of a network as a picture."""

from __future__ import annotations

import os
from collections.abc import Iterator

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from actprune.core.text import short
from actprune.graph.graph import Graph, Group
from actprune.report.figure import COLOURS, FAINT, INK, new_figure, plain, save, tidy
from actprune.report.text import clipped, count

ROW, COLUMN = 0.21, 0.17
"""Inches for one group and for one module."""
LONGEST = 46
"""Characters of a reason that are shown."""
WRITES, READS = "writes", "reads"


def structure(graph: Graph, path: str | os.PathLike[str], title: str = "") -> Figure:
    """Draw one line per group and one column per weight matrix: a dot where it writes the group, a ring where it reads it.

    What lies on one line loses the same units. A locked group is grey, and its reason is written at its end. Both orders are
    those of execution.

    Args:
        graph: what ``actprune.trace`` returned.
        path: file to write; its suffix chooses the format (``.png``, ``.svg``, ``.pdf``).
        title: name of the network.

    Raises:
        ValueError: the network has no groups to draw.
        OSError: the file cannot be written.
    """
    if not graph.groups:
        raise ValueError("the graph has no groups: no parameter of the network was used on the example inputs")
    marks = {group.name: _marks(graph, group) for group in graph.groups}
    drawn = {module for found in marks.values() for module in found}
    modules = [module for module in dict.fromkeys(map(_module, graph.shapes)) if module in drawn]
    place = {module: x for x, module in enumerate(modules)}
    figure = new_figure(4.2 + COLUMN * len(modules) + 0.055 * LONGEST, 2.4 + ROW * len(graph.groups))
    axes = figure.add_subplot()
    tidy(axes, grid="x")
    for y, group in enumerate(graph.groups):
        _line(axes, y, group, {place[module]: kinds for module, kinds in marks[group.name].items()}, len(modules))
    names = [f"{plain(group.name)}  {group.size}" for group in graph.groups]
    axes.set_yticks(range(len(names)), names, fontsize=7)
    axes.set_xticks(range(len(modules)), [plain(module) for module in modules], fontsize=6, rotation=90)
    axes.tick_params(axis="both", length=0)
    axes.spines["left"].set_visible(False)
    axes.set_xlim(-0.8, len(modules) - 0.2)
    axes.set_ylim(len(names) - 0.4, -0.6)
    sizes = f"{short(graph.params)} parameters, {short(graph.macs)} MACs"
    cuttable = f"{len(graph.unlocked)} of {len(graph.groups)} groups can be cut"
    axes.set_title(", ".join(part for part in (plain(title), cuttable, sizes) if part), loc="left", fontsize=9, color=INK)
    handles = [
        _handle(COLOURS[0], COLOURS[0], "writes the group"),
        _handle("white", COLOURS[0], "reads the group"),
        _handle(FAINT, FAINT, "locked: cannot be cut"),
    ]
    figure.legend(handles=handles, loc="outside lower left", ncols=3, frameon=False, fontsize=7, labelcolor=INK)
    save(figure, path)
    return figure


def _marks(graph: Graph, group: Group) -> dict[str, set[str]]:
    """Module -> whether a weight matrix of it writes the group, reads it, or both."""
    read = {(consumer.weight, consumer.reads_dim) for consumer in graph.consumers}
    found: dict[str, set[str]] = {}
    for name, dim in group.members:
        if len(graph.shapes[name]) > 1:
            input_of_locked = group.locked is not None and dim > 0 and name.endswith("weight")  # consumers list what can be cut
            kind = READS if (name, dim) in read or input_of_locked else WRITES
            found.setdefault(_module(name), set()).add(kind)
    return found


def _line(axes: Axes, y: int, group: Group, marks: dict[int, set[str]], end: int) -> None:
    colour = FAINT if group.locked else COLOURS[y % len(COLOURS)]
    if marks:
        axes.plot([min(marks), max(marks)], [y, y], color=colour, linewidth=1, alpha=0.6, zorder=2)
    for x, kind in _spread(marks):
        face = colour if kind == WRITES else "white"
        axes.plot(x, y, "o", markersize=5, markerfacecolor=face, markeredgecolor=colour, markeredgewidth=1.2, zorder=3)
    tensors = len({name for name, _ in group.members})
    text = f"{count(tensors)} tensor{'s' if tensors != 1 else ''}"
    if group.locked:
        text = clipped(group.locked, LONGEST)
    axes.annotate(plain(text), (end - 0.2, y), (4, 0), textcoords="offset points", va="center", fontsize=6.5, color=INK)


def _spread(marks: dict[int, set[str]]) -> Iterator[tuple[float, str]]:
    """A module that reads and writes the same group gets its marks side by side."""
    for x, kinds in marks.items():
        offsets = np.linspace(-0.22, 0.22, len(kinds)) if len(kinds) > 1 else (0.0,)
        yield from ((float(x + offset), kind) for offset, kind in zip(offsets, sorted(kinds), strict=True))


def _handle(face: str, edge: str, label: str) -> Line2D:
    return Line2D([], [], marker="o", linestyle="", markersize=5, markerfacecolor=face, markeredgecolor=edge, label=label)


def _module(tensor: str) -> str:
    return tensor.rpartition(".")[0] or tensor
