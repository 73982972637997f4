"""Signals wait while what must not be done by half is done: Ctrl-C, SLURM's notice, whatever Python handles."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any


@contextmanager
def held(interrupts: bool = True) -> Iterator[None]:
    """Signals that have a handler in Python and come inside the block are delivered right after it, each once.

    Blocks may be nested: the outermost one delivers. Off the main thread nothing is held, for no handler runs there.

    Args:
        interrupts: hold Ctrl-C too; False where waiting would be long and breaking off does no harm.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    came: list[int] = []

    def wait(number: int, frame: Any) -> None:
        if number not in came:
            came.append(number)

    try:
        with ExitStack() as handlers:
            for number in sorted(signal.valid_signals()):
                handler = signal.getsignal(number)
                if callable(handler) and (interrupts or number != signal.SIGINT):
                    handlers.callback(signal.signal, number, handler)
                    signal.signal(number, wait)
            yield
    finally:
        with ExitStack() as late:  # the others come also where the handler of one raises
            for other in reversed(came):
                late.callback(signal.raise_signal, other)
