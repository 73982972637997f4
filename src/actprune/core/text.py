"""Large numbers as people read them."""

from __future__ import annotations


def short(number: float, digits: int = 3) -> str:
    """Spell a count in a few significant digits, e.g. ``20k`` or ``1.25M``."""
    rounded = float(f"{number:.{digits}g}")
    for limit, suffix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(rounded) >= limit:
            return f"{rounded / limit:g}{suffix}"
    return f"{rounded:g}"
