"""Keep widths different that the code tells apart: a unit more leaves, or a few fewer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from actprune.graph import Apart, Graph


def equal(graph: Graph, gone: NDArray[np.bool_]) -> Apart | None:
    """Widths that have to differ and would not when the marked classes are gone; None: there are none."""
    for apart in graph.apart:
        one, *others = apart.widths(gone)
        # an integer may be that of an attribute, which follows
        followers = graph.followers if isinstance(apart.other, int) else ()
        follows = [f for f in followers if f.module == apart.module and len(f.counts) == apart.other]
        if one in (*others, *(f.value(gone) for f in follows)):
            return apart
    return None


def keep_apart(
    graph: Graph, ranked: Mapping[str, Sequence[int]], taken: Mapping[str, int], step: int = 1, more: bool = False
) -> dict[str, int]:
    """How many units of every group may leave, where some widths must not become equal.

    Args:
        graph: the channel graph.
        ranked: group name -> units that may leave, the first one first.
        taken: group name -> how many of them are to leave.
        step: by how many units these numbers change.
        more: whether more of them may leave, rather than fewer.
    """
    taken = dict(taken)

    def together(numbers: Mapping[str, int]) -> Apart | None:
        return equal(graph, graph.removed({name: ranked[name][:n] for name, n in numbers.items()}))

    while (found := together(taken) if graph.apart else None) is not None:
        classes = np.concatenate([found.one, *([] if isinstance(found.other, int) else [found.other])])
        names = [name for name in taken if np.isin(graph.group(name).classes, classes).any()]
        for name in names if more else ():
            larger = taken | {name: taken[name] + step}
            if larger[name] <= len(ranked[name]) and together(larger) is None:
                return larger
        # ends where nothing leaves, for then they differ
        most = max(names or taken, key=lambda name: taken[name])
        taken[most] = max(0, taken[most] - step)
    return taken
