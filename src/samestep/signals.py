"""A first signal asks for an orderly stop, a second one ends everything at once."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from samestep.errors import Interrupted


EXIT_CODES = {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGUSR1: 75}
"""SIGUSR1 is what a scheduler sends ahead of its time limit: run `resume` later."""


@dataclass
class Stop:
    """The wish to stop."""

    number: int | None = None
    """The signal that was received."""

    @property
    def exit_code(self) -> int:
        """Of a process that stopped because of the signal."""
        return EXIT_CODES[signal.Signals(self.number or signal.SIGINT)]


@contextmanager
def stop_on_signals() -> Iterator[Stop]:
    """Handlers as above; none outside the main thread, where Python allows none."""
    stop = Stop()

    def receive(number: int, _: Any) -> None:
        if stop.number is not None:
            raise Interrupted("stopped at once by a second signal", stop.exit_code)
        stop.number = number

    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    before = {number: signal.signal(number, receive) for number in EXIT_CODES}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
