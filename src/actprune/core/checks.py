"""Small questions to settings."""

from __future__ import annotations

from numbers import Integral


def is_whole(value: object) -> bool:
    """Whether a setting is an integer, and not a truth value."""
    return isinstance(value, Integral) and not isinstance(value, bool)
