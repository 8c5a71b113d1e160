"""A thread of each worker that acts while the training waits for somebody.

torchrun ends its workers with SIGTERM, also to start them again with other members.
Python's handlers only run between two instructions of the main thread, which may wait
in a collective; the wake-up descriptor tells this thread at once. And if torchrun
itself is killed, its workers have another parent.
"""

import os
import select
import signal
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from samestep.system.signals import EXIT_CODES, Stop


POLL_SECONDS = 0.5
"""How often to look for the parent."""
STOP_SECONDS = 5.0
"""Deadline for the training to stop by itself; torchrun kills after 30 s."""
ENDING_SECONDS = 60.0
"""Deadline for a main thread that is ending the process, as with a last checkpoint on a
disk that hangs: without it, a worker that nobody else ends would live for ever."""
ORPHANED = 1
"""The exit code of a worker whose parent is gone."""


@dataclass
class Watcher:
    """Ends this process when it must end, with what can be saved."""

    ask: Callable[[], None] = lambda: None
    """Asks for an orderly stop at the next point."""
    save: Callable[[], None] = lambda: None
    """What is left to do when that does not come."""
    stop: Stop = field(default_factory=Stop)
    ending: threading.Lock = field(default_factory=threading.Lock)
    """Held by the thread that ends the process."""
    ending_seconds: float = ENDING_SECONDS
    _parent: int = field(default_factory=os.getppid)
    _arrived: socket.socket = field(init=False)
    _news: threading.Event = field(default_factory=threading.Event)

    def start(self) -> None:
        """The main thread. Signals are only noticed here from now on."""
        self._arrived, wakeup = socket.socketpair()
        wakeup.setblocking(False)
        signal.set_wakeup_fd(wakeup.detach(), warn_on_full_buffer=False)
        for number in EXIT_CODES:
            signal.signal(number, lambda *_: None)
        threading.Thread(target=self._watch, name="watcher", daemon=True).start()

    def wait_for_signal(self, seconds: float) -> bool:
        """Whether one has come, or comes within this time."""
        return self._news.wait(seconds)

    def _watch(self) -> None:
        deadline = float("inf")
        while True:
            if select.select([self._arrived], [], [], POLL_SECONDS)[0]:
                number = self._arrived.recv(1)[0]
                if number in list(EXIT_CODES) and self.stop.number is None:
                    self.stop.number = number
                    deadline = time.monotonic() + STOP_SECONDS
                    self._news.set()
                    self.ask()
            if os.getppid() != self._parent:
                self._end(ORPHANED)
            if time.monotonic() > deadline:
                self._end(self.stop.exit_code)

    def _end(self, code: int) -> None:
        """If the main thread is already at it, it gets some time to finish."""
        is_ours = self.ending.acquire(timeout=self.ending_seconds)
        try:
            if is_ours:
                self.save()
        finally:
            os._exit(code)
