"""Run a function, or run.py, in a process of its own.

On Linux it is a fork of the test's process: torch and Lightning take ten seconds to import, and a fork has imported them. What
pytest changed is put back in it: output goes to the process's own files, warnings and logging are Python's. Elsewhere run.py
is started anew, and a function cannot be run.
"""

import contextlib
import functools
import logging
import os
import runpy
import signal
import subprocess
import sys
import time
import traceback
import warnings
from dataclasses import dataclass

import pytest
from torch.utils._python_dispatch import TorchDispatchMode

from paths import ROOT

FORKS = sys.platform == "linux"
needs_fork = pytest.mark.skipif(not FORKS, reason="needs fork")
needs_operators_of_functions = pytest.mark.skipif(
    not hasattr(TorchDispatchMode, "supports_higher_order_operators"), reason="this torch has no such operators under a mode"
)
"""``torch.cond`` and its like; they compile, so such a test runs ``apart``."""
RUN = str(ROOT / "run.py")


@dataclass
class Done:
    """How a process ended; as ``subprocess.run`` says it."""

    returncode: int
    stdout: str
    stderr: str


class Fork:
    """A function that runs in a fork of this process, in a folder and with more environment variables."""

    def __init__(self, function, *args, folder, **environment):
        self._outputs = [os.memfd_create(name) for name in ("stdout", "stderr")]
        self.returncode = None
        self.pid = os.fork()
        if self.pid == 0:
            self._become(function, args, folder, environment)
        with contextlib.suppress(OSError):
            os.setpgid(self.pid, self.pid)

    def poll(self):
        """The exit status; None while it runs."""
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.returncode = os.waitstatus_to_exitcode(status) if pid else None
        return self.returncode

    def kill(self):
        """Kill it with its children, at once."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        while self.poll() is None:
            time.sleep(0.01)
        self._texts()

    def wait(self, timeout=240):
        """Wait for its end."""
        end = time.monotonic() + timeout
        while self.poll() is None:
            if time.monotonic() > end:
                self.kill()
                raise TimeoutError(f"not done after {timeout} s")
            time.sleep(0.01)
        return Done(self.returncode, *self._texts())

    def _texts(self):
        texts = [os.pread(output, os.fstat(output).st_size, 0).decode() for output in self._outputs]
        for output in self._outputs:
            os.close(output)
        return texts

    def _become(self, function, args, folder, environment):
        status = 1
        try:
            os.setpgid(0, 0)  # children of its own end with it
            _plain(self._outputs)
            os.chdir(folder)
            os.environ.update(environment)
            status = _status(function, *args)
            sys.stdout.flush()
            sys.stderr.flush()
        finally:
            os._exit(status)


def apart(test):
    """Run a test in a process of its own: compiling starts threads, after which forks of this process cannot train."""

    @functools.wraps(test)
    def forked(*args, **kwargs):
        if FORKS:
            done = Fork(functools.partial(test, *args, **kwargs), folder=os.getcwd()).wait()
            assert done.returncode == 0, done.stderr
        else:
            test(*args, **kwargs)

    return forked


def run_py(*arguments, folder, **environment):
    """Run run.py to its end."""
    if FORKS:
        return start_run_py(*arguments, folder=folder, **environment).wait()
    done = subprocess.run([sys.executable, RUN, *arguments], cwd=folder, env={**os.environ, **environment},
                          capture_output=True, text=True, timeout=240)  # fmt: skip
    return Done(done.returncode, done.stdout, done.stderr)


def start_run_py(*arguments, folder, **environment):
    """Start run.py."""
    return Fork(_script, arguments, folder=folder, **environment)


def _script(arguments):
    sys.argv = [RUN, *arguments]
    runpy.run_path(RUN, run_name="__main__")


def _status(function, *args):
    try:
        function(*args)
    except SystemExit as stop:
        if isinstance(stop.code, str):
            print(stop.code, file=sys.stderr)
            return 1
        return stop.code or 0
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def _plain(outputs):
    """Undo what pytest did to output, warnings and logging."""
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for number, (output, name) in enumerate(zip(outputs, ("stdout", "stderr"), strict=True), start=1):
        os.dup2(output, number)
        stream = open(number, "w", encoding="utf-8", buffering=1, closefd=False)  # noqa: SIM115
        setattr(sys, name, stream)
        setattr(sys, f"__{name}__", stream)
    warnings.resetwarnings()
    for category in (DeprecationWarning, PendingDeprecationWarning, ImportWarning, ResourceWarning):
        warnings.simplefilter("ignore", category)
    logging.root.handlers.clear()
    for logger in logging.root.manager.loggerDict.values():
        for handler in getattr(logger, "handlers", ()):
            if type(handler) is logging.StreamHandler:
                handler.setStream(sys.stderr)
