"""Tables of a group influence analysis: for the console (at most 100 columns) and as CSV in full precision."""

from __future__ import annotations

import math
import os
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from actprune.pruning import EFFECT, RANDOM, Agreement, GroupInfluence, Influence, Removal
from actprune.report.sheet import write_rows
from actprune.report.text import clipped, count, percent, points, signed

WHOLE = "whole network"
TABLES = ("groups.csv", "units.csv", "removals.csv", "spearman.csv")
_LEGEND = (
    "params, MACs: what leaves with the whole group. Loss of one unit: its rise when one unit alone is its mean, median to "
    "most, on {alone} samples. The rest: change of the accuracy, in points, when the lowest {share} are their means: drawn at "
    "random, by the criterion that loses most, and by the one that loses least, which is named; +1: one more loses as little. "
    "Criteria that score not all, or all alike, do not compete. The best of many is partly luck: compare with random."
)
_LABEL, _ACROSS = 20, 20
_NAME = 18
"""Characters of the name of the best criterion."""
SHOWN = 24
"""Groups printed in full; longer lists keep their first and last ones."""


def influence_tables(influence: Influence, agreement: Agreement) -> RenderableType:
    """Show what every group carries and what its removal costs, and how criteria agree with it and with each other."""
    share = percent(middle_share(influence), 0)
    alone = max((group.n_alone for group in influence.groups), default=0)
    return Group(
        _groups(influence),
        Text(_LEGEND.format(share=share, alone=count(alone)), style="dim"),
        Text(),
        _effects(agreement),
        Text(f"{_noise(agreement)}{_unscored(influence)}", style="dim"),
        Text(),
        _matrix(agreement),
    )


def write_influence(influence: Influence, agreement: Agreement, folder: str | os.PathLike[str]) -> list[Path]:
    """Write ``TABLES`` into a folder.

    ``groups.csv`` has one row per group, and one for the whole network: what it carries, the distribution of every criterion's
    scores, and loss and accuracy after every removal. The others are the same in long form: one row per unit, per removal, and
    per pair of criteria.
    """
    paths = [Path(folder) / name for name in TABLES]
    rows = [_wide(influence, group) for group in influence.groups]
    whole = {"group": WHOLE, "params": influence.params, "macs": influence.macs}
    rows.append(whole | {"loss": influence.loss, "accuracy": influence.accuracy} | _removed(influence.whole))
    write_rows(paths[0], rows)
    write_rows(paths[1], [row for group in influence.groups for row in _units(group)])
    several = [(group.name, group.removals) for group in influence.groups] + [(WHOLE, influence.whole)]
    write_rows(paths[2], [{"group": name, **vars(removal)} for name, removals in several for removal in removals])
    write_rows(paths[3], _pairs(agreement))
    return paths


def distribution(scores: Sequence[float]) -> dict[str, float]:
    """Least, quartiles, greatest and mean."""
    low, first, median, third, high = np.quantile(scores, [0, 0.25, 0.5, 0.75, 1]).tolist()
    return {"min": low, "q1": first, "median": median, "q3": third, "max": high, "mean": float(np.mean(scores))}


def middle_share(influence: Influence) -> float:
    """The share, of those that were removed, that is nearest to a half."""
    return min((removal.share for removal in influence.whole), key=lambda share: (abs(share - 0.5), share))


def _groups(influence: Influence) -> Group:
    share = middle_share(influence)
    title = (
        f"{len(influence.groups)} groups · {count(influence.params)} parameters · {count(influence.macs)} MACs · "
        f"loss {influence.loss:.4f}, accuracy {percent(influence.accuracy, 2)} on {count(influence.n_measured)} samples"
    )
    table = _table("group", "units", "params", "MACs", "loss of one unit", "random", "worst", "best", "by")
    table.columns[-1].justify = "left"
    rows = [(group.name, group) for group in influence.groups]
    half = SHOWN // 2
    shown = rows if len(rows) <= SHOWN else [*rows[:half], (f"… {len(rows) - SHOWN} more", None), *rows[-half:]]
    for name, group in shown:
        if group is None:
            table.add_row(name, style="dim")
            continue
        alone = statistics.median(group.unit_loss)
        table.add_row(
            Text(name),
            str(group.size),
            percent(group.params / influence.params),
            percent(group.macs / influence.macs),
            f"{alone:.4f} to {max(group.unit_loss):.4f}",
            *_accuracies(group.removals, share, influence.accuracy, [group]),
        )
    table.add_section()
    everything = _accuracies(influence.whole, share, influence.accuracy, influence.groups)
    table.add_row(WHOLE, "", "", "", "", *everything, style="bold")
    return Group(Text(title, style="bold"), table)


def _accuracies(
    removals: Sequence[Removal], share: float, whole: float, groups: Sequence[GroupInfluence]
) -> list[RenderableType]:
    by = {removal.criterion: removal.accuracy for removal in removals if removal.share == share and removal.end != "highest"}
    drawn = by.pop(RANDOM)
    by = {name: accuracy for name, accuracy in by.items() if _ranks(name, groups)}
    if not by:
        return [points(drawn - whole), "", "", ""]
    most = max(by.values())
    best, *ties = (name for name, accuracy in by.items() if accuracy == most)
    return [points(drawn - whole), points(min(by.values()) - whole), points(most - whole), Text(_and_more(best, len(ties)))]


def _ranks(name: str, groups: Sequence[GroupInfluence]) -> bool:
    """Whether a criterion scores all of the groups, and tells units apart: else less is removed, or what is drawn."""
    scores = [group.scores.get(name, ()) for group in groups]
    return all(scores) and any(min(units) < max(units) for units in scores)


def _and_more(name: str, n: int) -> str:
    more = f" +{n}" if n else ""
    return clipped(name, _NAME - len(more)) + more


def _effects(agreement: Agreement) -> Group:
    row = list(agreement.names).index(EFFECT)
    names = [name for name in agreement.names if name != EFFECT]
    table = _table("criterion", "rho", "95 % interval", "groups")
    place = {name: k for k, name in enumerate(agreement.names)}
    known = sorted(names, key=lambda name: -_or(agreement.mean[row][place[name]], -2))
    for name in known:
        k = place[name]
        low, high = agreement.low[row][k], agreement.high[row][k]
        interval = "-" if math.isnan(low) else f"{_rho(low)} to {_rho(high)}"
        style = "dim" if name == RANDOM else None
        table.add_row(Text(name), _rho(agreement.mean[row][k]), interval, str(agreement.n_groups[row][k]), style=style)
    return Group(Text("Spearman's rho with the effect of removing one unit · mean over groups", style="bold"), table)


def _noise(agreement: Agreement) -> str:
    text = "Interval: bootstrap over the groups of this network. Random is what no information gives."
    if math.isnan(agreement.halves):
        return text
    return (
        f"{text} The effect itself, measured on two halves of the samples, agrees at {_rho(agreement.halves)}: "
        f"who knew it exactly would reach about {_rho(agreement.ceiling)} here."
    )


def _unscored(influence: Influence) -> str:
    names = [name for name in influence.criteria if not any(name in group.scores for group in influence.groups)]
    return f" Without anything to go by in any group: {', '.join(names)}." if names else ""


def _matrix(agreement: Agreement) -> Group:
    """Lower triangle in hundredths; more than ``_ACROSS`` columns are set below each other."""
    names = [clipped(f"{i + 1} {name}", _LABEL) for i, name in enumerate(agreement.names)]
    lines = []
    for first in range(0, len(names), _ACROSS):
        columns = range(first, min(first + _ACROSS, len(names)))
        lines.append(" " * _LABEL + "".join(f"{j + 1:>4}" for j in columns))
        for i in range(first, len(names)):
            cells = (agreement.mean[i][j] for j in columns if j <= i)
            lines.append(f"{names[i]:<{_LABEL}}" + "".join("   ·" if math.isnan(x) else f"{round(100 * x):>4}" for x in cells))
    title = Text("rank correlation of every two, in hundredths · mean over groups", style="bold")
    return Group(title, Text("\n".join(lines), no_wrap=True))


def _table(first: str, *others: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column(first, overflow="fold", max_width=26)
    for name in others:
        table.add_column(name, justify="right", no_wrap=True)
    return table


def _rho(value: float) -> str:
    return "-" if math.isnan(value) else signed(value)


def _or(value: float, other: float) -> float:
    return other if math.isnan(value) else value


def _wide(influence: Influence, group: GroupInfluence) -> dict[str, Any]:
    row: dict[str, Any] = {
        "group": group.name,
        "units": group.size,
        "params": group.params,
        "macs": group.macs,
        "loss": influence.loss,
        "accuracy": influence.accuracy,
        "units_alone": len(group.units),
        "samples_alone": group.n_alone,
    }
    row |= {f"unit_loss_{key}": value for key, value in distribution(group.unit_loss).items()}
    for name, scores in group.scores.items():
        row |= {f"{name}_{key}": value for key, value in distribution(scores).items()}
    return row | _removed(group.removals)


def _removed(removals: Sequence[Removal]) -> dict[str, float]:
    found: dict[str, float] = {}
    for removal in removals:
        key = f"{removal.criterion}_{removal.end}_{removal.share:g}"
        found |= {f"{key}_loss": removal.loss, f"{key}_accuracy": removal.accuracy}
    return found


def _units(group: GroupInfluence) -> list[dict[str, Any]]:
    effect = dict(zip(group.units, zip(group.unit_loss, group.unit_accuracy, strict=True), strict=True))
    return [
        {
            "group": group.name,
            "unit": unit,
            "loss_rise": effect[unit][0] if unit in effect else None,
            "accuracy_change": effect[unit][1] if unit in effect else None,
            **{name: scores[unit] for name, scores in group.scores.items()},
        }
        for unit in range(group.size)
    ]


def _pairs(agreement: Agreement) -> list[dict[str, Any]]:
    return [
        {
            "one": one,
            "other": other,
            "spearman": _blank(agreement.mean[i][j]),
            "low": _blank(agreement.low[i][j]),
            "high": _blank(agreement.high[i][j]),
            "groups": agreement.n_groups[i][j],
            **{f"group {name}": _blank(matrix[i][j]) for name, matrix in agreement.by_group.items()},
        }
        for i, one in enumerate(agreement.names)
        for j, other in enumerate(agreement.names)
    ]


def _blank(value: float) -> float | None:
    return None if math.isnan(value) else value
