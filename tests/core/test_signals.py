"""Signals that wait."""

import contextlib
import signal
import threading

import pytest

from actprune.core.signals import held


@pytest.fixture(autouse=True)
def _interrupts():
    """Ctrl-C raises, also where a shell started this in the background, which ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_interrupt_comes_after_the_block():
    done = []

    def interrupted():
        with held():
            with held():
                signal.raise_signal(signal.SIGINT)
                done.append("inner")
            done.append("outer")
        done.append("after")

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert done == ["inner", "outer"]


def test_handlers_are_as_before_and_run_once_each():
    seen = []
    before = {number: signal.signal(number, lambda n, _: seen.append(n)) for number in (signal.SIGTERM, signal.SIGUSR1)}
    mine = signal.getsignal(signal.SIGUSR1)
    try:
        with contextlib.suppress(ValueError), held():
            for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGUSR1):
                signal.raise_signal(number)
            assert not seen
            raise ValueError
        assert signal.getsignal(signal.SIGUSR1) is mine
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    assert seen == [signal.SIGUSR1, signal.SIGTERM]


def test_interrupts_can_be_let_through():
    with pytest.raises(KeyboardInterrupt), held(interrupts=False):
        signal.raise_signal(signal.SIGINT)


def test_nothing_is_held_off_the_main_thread():
    handlers = []

    def work():
        with held():
            handlers.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert handlers == [signal.getsignal(signal.SIGINT)]


def test_all_are_delivered_where_one_of_them_raises():
    seen = []

    def both():
        with held():
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGTERM)

    before = signal.signal(signal.SIGTERM, lambda *_: seen.append("term"))
    try:
        with pytest.raises(KeyboardInterrupt):
            both()
    finally:
        signal.signal(signal.SIGTERM, before)
    assert seen == ["term"]
