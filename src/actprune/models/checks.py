"""Checks of model settings."""

from __future__ import annotations

from actprune.core.errors import ConfigError


def check_positive(**values: object) -> None:
    """Check that every named value is a whole number of at least 1.

    Raises:
        ConfigError: one is not.
    """
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ConfigError(f"{name}={value!r} must be a whole number of at least 1")


def check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    """Check that a setting is one of its choices.

    Raises:
        ConfigError: it is not.
    """
    if value not in choices:
        raise ConfigError(f"{name}={value!r} must be one of {', '.join(choices)}")
