"""A first signal asks for an orderly stop, a second one ends everything at once.

And how processes end with their parents.
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
"""SIGHUP is the end of the terminal, as when ssh loses its connection. SIGUSR1 is what
a scheduler sends ahead of its time limit: run `resume` later."""


PR_SET_PDEATHSIG = 1
"""From Linux's prctl.h."""


def end_with(parent: int) -> None:
    """From now on, Linux kills this process when the thread that made it ends.

    Or at once, if `parent` is gone already. Elsewhere the end of a pipe has to tell.
    """
    _set_death_signal(signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


def end_alone() -> None:
    """Takes `end_with` back."""
    _set_death_signal(0)


def _set_death_signal(number: int) -> None:
    prctl = getattr(ctypes.CDLL(None), "prctl", None)
    if prctl is not None:
        prctl(PR_SET_PDEATHSIG, number)


def how_it_ended(code: int) -> str:
    """A process, by its exit code; -n: by signal n."""
    if code >= 0:
        return f"it exited with code {code} without an error message"
    name = signal.Signals(-code).name
    hint = " (the kernel does so when memory runs out)" if name == "SIGKILL" else ""
    return f"it was killed by {name}{hint}"


@dataclass
class Stop:
    """The wish to stop."""

    number: int | None = None
    """The signal that was received."""
    is_urgent: bool = False
    """Whether a second one was received, which ends everything at once."""

    @property
    def exit_code(self) -> int:
        """Of a process that stopped because of the signal, or of no signal at all."""
        return EXIT_CODES[signal.Signals(self.number or signal.SIGUSR1)]


@contextmanager
def stop_on_signals() -> Iterator[Stop]:
    """Handlers as above; none outside the main thread, where Python allows none.

    And none for SIGHUP if it is ignored, which is how `nohup` is told.
    """
    stop = Stop()
    terminals = [descriptor for descriptor in (1, 2) if os.isatty(descriptor)]

    def receive(number: int, _: Any) -> None:
        if number == signal.SIGHUP:
            _forget(terminals)
            if stop.number is not None:  # a shell and the kernel say it, each once
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
    """They are gone: what is still written there must not fail."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for descriptor in terminals:
        os.dup2(nowhere, descriptor)
    os.close(nowhere)
