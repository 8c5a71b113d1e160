"""Signals: the first asks for an orderly stop, a second one stops at once.

Also ends processes together with their parents.
"""

import ctypes
import os
import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from samestep.errors import Interrupted


EXIT_CODES = {
    signal.SIGHUP: 129,
    signal.SIGINT: 130,
    signal.SIGTERM: 143,
    signal.SIGUSR1: 75,
}
"""SIGHUP means that the terminal is gone, as when ssh loses its connection. SIGUSR1 is
what a scheduler sends before its time limit; `samestep resume` continues later."""


PR_SET_PDEATHSIG = 1
"""The constant in Linux's prctl.h."""


def end_with(parent: int) -> None:
    """Let Linux kill this process when the thread that started it ends.

    Exits at once if `parent` has ended already. Other systems have no such signal;
    there, processes notice that a pipe of their parent is closed.
    """
    _set_death_signal(signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


def end_alone() -> None:
    """Undo `end_with`."""
    _set_death_signal(0)


def _set_death_signal(number: int) -> None:
    prctl = getattr(ctypes.CDLL(None), "prctl", None)
    if prctl is not None:
        prctl(PR_SET_PDEATHSIG, number)


CRASHED = (
    ' (a library crashed: where it is torch\'s, set `arithmetic = "portable"`, which '
    "computes without it)"
)
HINTS = {
    "SIGKILL": " (the kernel does so when memory runs out)",
    **dict.fromkeys(("SIGABRT", "SIGBUS", "SIGFPE", "SIGILL", "SIGSEGV"), CRASHED),
}
"""What the signals that end a process may mean."""


def how_it_ended(code: int) -> str:
    """Say how a process ended by its exit code; -n: by signal n."""
    if code >= 0:
        return f"it exited with code {code} without an error message"
    name = signal.Signals(-code).name
    return f"it was killed by {name}{HINTS.get(name, '')}"


@dataclass
class Stop:
    """A request to stop."""

    number: int | None = None
    """The signal that was received."""
    is_urgent: bool = False
    """Whether a second one was received, which ends everything at once."""

    @property
    def exit_code(self) -> int:
        """The exit code after the signal; without a signal, that of SIGUSR1."""
        return EXIT_CODES[signal.Signals(self.number or signal.SIGUSR1)]


@contextmanager
def stop_on_signals() -> Iterator[Stop]:
    """Install the handlers described above; a second signal raises Interrupted.

    Outside the main thread, where Python allows no handlers, none are installed. An
    ignored SIGHUP stays ignored, since that is how `nohup` works.
    """
    stop = Stop()
    terminals = [descriptor for descriptor in (1, 2) if os.isatty(descriptor)]

    def receive(number: int, _: Any) -> None:
        if number == signal.SIGHUP:
            _forget(terminals)
            if stop.number is not None:  # the shell and the kernel each send one
                return
        if stop.number is not None:
            stop.is_urgent = True
            raise Interrupted("stopped at once by a second signal", stop.exit_code)
        stop.number = number

    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    numbers = set(EXIT_CODES)
    if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN:
        numbers.remove(signal.SIGHUP)
    before = {number: signal.signal(number, receive) for number in numbers}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _forget(terminals: Sequence[int]) -> None:
    """Redirect lost terminals to /dev/null, so that writing to them does not fail."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for descriptor in terminals:
        os.dup2(nowhere, descriptor)
    os.close(nowhere)
