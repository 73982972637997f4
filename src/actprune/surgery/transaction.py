"""Changes that can be taken back: every step knows its inverse, and inverses run in reverse order."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from actprune.core.signals import held


class Transaction:
    """Collects the inverse of every change made so far."""

    def __init__(self) -> None:
        self._inverses: list[Callable[[], None]] = []

    def did(self, inverse: Callable[[], None]) -> None:
        """Remember how to take back the change just made."""
        self._inverses.append(inverse)

    def roll_back(self) -> None:
        """Take back every change, the last one first; signals wait for that."""
        with held():
            while self._inverses:
                self._inverses.pop()()


@contextmanager
def transaction() -> Iterator[Transaction]:
    """All changes of the block stay, or on any exception none does."""
    changes = Transaction()
    try:
        yield changes
    except BaseException:
        changes.roll_back()
        raise
