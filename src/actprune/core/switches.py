"""Switches that hold for the whole process: of several threads the first one in turns them, the last one out puts them back."""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from contextvars import copy_context
from functools import partial
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel


class Switch:
    """A context manager that many blocks may be in at once, in any order of leaving.

    Args:
        turn: makes the context manager that turns the switch, and puts it back at its end.
    """

    def __init__(self, turn: Callable[[], AbstractContextManager[Any]]) -> None:
        self._turn = turn
        self._lock = threading.Lock()
        self._inside = 0
        self._put_back: Callable[[], Any] | None = None

    @contextmanager
    def turned(self) -> Iterator[None]:
        """The switch is turned inside the block."""
        with self._lock:
            if not self._inside:
                turned, context = self._turn(), copy_context()  # what is set there, no other thread's context may reset
                context.run(turned.__enter__)
                self._put_back = partial(context.run, turned.__exit__, None, None, None)
            self._inside += 1
        try:
            yield
        finally:
            with self._lock:
                self._inside -= 1
                if not self._inside and self._put_back is not None:
                    self._put_back()
                    self._put_back = None


@contextmanager
def _every_module() -> Iterator[None]:
    fastpath = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fastpath)


@contextmanager
def _plain_attention() -> Iterator[None]:
    with EVERY_MODULE.turned(), sdpa_kernel(SDPBackend.MATH):
        yield


@contextmanager
def _kept() -> Iterator[None]:
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collects:
            gc.enable()


EVERY_MODULE = Switch(_every_module)
"""No fused kernel for a transformer's layer: it reads the weights of the layers inside past their forwards, and nests padded
batches."""
PLAIN_ATTENTION = Switch(_plain_attention)
"""No fused kernel for attention: every product in it is an operator that can be seen."""
EAGER = Switch(lambda: torch.compiler.set_stance("force_eager"))
"""What is compiled runs eagerly."""
GENERATOR = Switch(lambda: torch.random.fork_rng(devices=[]))
"""The CPU's random numbers go on afterwards as if none had been drawn."""
GARBAGE = Switch(_kept)
"""No search for cycles of garbage: one looks through every object there is, and making thousands that stay sets off many."""
