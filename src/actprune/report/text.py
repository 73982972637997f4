"""Numbers as people read them: one spelling for tables and pictures."""

from __future__ import annotations


def count(number: float) -> str:
    """Spell a count in full, e.g. ``19,978``."""
    return f"{number:,.0f}"


def percent(share: float, digits: int = 1) -> str:
    """Spell a share in [0, 1] as ``40.0 %``."""
    return f"{100 * share:.{digits}f} %"


def points(difference: float) -> str:
    """Spell a difference of two accuracies in [0, 1] in percentage points with its sign, e.g. ``-0.28``."""
    return signed(100 * difference)


def change(before: float, after: float) -> str:
    """Spell a relative change as ``-60.0 %``."""
    return f"{signed(100 * (after / before - 1), 1)} %"


def signed(number: float, digits: int = 2) -> str:
    """Spell a number with its sign, e.g. ``-0.28``; what rounds to zero is ``+0.00``."""
    return f"{round(number, digits) + 0.0:+.{digits}f}"  # adding 0.0 turns a rounded -0.0 into 0.0


def clipped(text: str, room: int) -> str:
    """As much of a text as there is room for, in characters; what was left out is an ellipsis."""
    return text if len(text) <= room else f"{text[: room - 1]}…"
