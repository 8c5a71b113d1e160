"""A thread of each worker that reacts while the main thread waits in a collective.

torchrun ends its workers with SIGTERM, also to restart them with other members. Python
runs signal handlers only between two instructions of the main thread; the wake-up
descriptor reaches this thread at once. It also notices when torchrun itself is killed:
the parent process changes. And the agent tells it when another machine was lost, in
memory that both have, so that it does not wait for a step that cannot end.
"""

import contextlib
import os
import select
import signal
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from samestep.system import shared_memory
from samestep.system.signals import EXIT_CODES, Stop


POLL_SECONDS = 0.5
"""Seconds between two checks of the parent process."""
STOP_SECONDS = 5.0
"""Deadline for the training to stop in order. torchrun kills after 30 s, or after
`nodes.SHUTDOWN_SECONDS`."""
ENDING_SECONDS = 60.0
"""Deadline for the thread that ends the process. Without it, an orphaned worker whose
last checkpoint goes to a disk that hangs would live for ever."""
ORPHANED = 1
"""The exit code of a worker whose parent is gone."""
LOSS = "SAMESTEP_LOSS"
"""The environment variable with a file of the agent, which is empty until it has lost a
machine. Only Linux has such files; elsewhere workers wait for STOP_SECONDS."""


def expect_no_loss() -> None:
    """Agent: let the workers that it starts from now on see a loss."""
    if LOSS not in os.environ:
        os.environ[LOSS] = f"/proc/{os.getpid()}/fd/{shared_memory.create()}"
    _set_loss(0)


def announce_loss() -> None:
    """Agent, before it ends the workers: say that a machine is lost."""
    _set_loss(1)


def _set_loss(size: int) -> None:
    with contextlib.suppress(OSError):
        os.truncate(os.environ[LOSS], size)


def wake_workers(agent: int) -> None:
    """Agent or worker, before workers are ended: wake those that SIGSTOP has stopped.

    They would not notice the signal of torchrun, which kills them only after 30 s.
    """
    with contextlib.suppress(psutil.NoSuchProcess):
        for process in psutil.Process(agent).children(recursive=True):
            if process.status() == psutil.STATUS_STOPPED:
                process.resume()


def is_loss_announced() -> bool:
    """Worker: return whether the agent has lost a machine."""
    try:
        return Path(os.environ[LOSS]).stat().st_size > 0
    except (KeyError, OSError):
        return False


@dataclass
class Watcher:
    """Ends this process when it has to, after saving what can be saved."""

    ask: Callable[[], None] = lambda: None
    """Requests an orderly stop at the next sync of metrics."""
    save: Callable[[], None] = lambda: None
    """Called before the process ends without an orderly stop."""
    stop: Stop = field(default_factory=Stop)
    ending: threading.Lock = field(default_factory=threading.Lock)
    """Held by the thread that ends the process."""
    ending_seconds: float = ENDING_SECONDS
    _parent: int = field(default_factory=os.getppid)
    _arrived: socket.socket = field(init=False)
    _news: threading.Event = field(default_factory=threading.Event)

    def start(self) -> None:
        """Start the thread, from the main thread; from now on it handles signals."""
        self._arrived, wakeup = socket.socketpair()
        wakeup.setblocking(False)
        signal.set_wakeup_fd(wakeup.detach(), warn_on_full_buffer=False)
        for number in EXIT_CODES:
            signal.signal(number, lambda *_: None)
        threading.Thread(target=self._watch, name="watcher", daemon=True).start()

    def wait_for_signal(self, seconds: float) -> bool:
        """Return whether a signal has arrived or arrives within `seconds`."""
        return self._news.wait(seconds)

    def _watch(self) -> None:
        deadline = float("inf")
        while True:
            if select.select([self._arrived], [], [], POLL_SECONDS)[0]:
                number = self._arrived.recv(1)[0]
                if number in list(EXIT_CODES) and self.stop.number is None:
                    self.stop.number = number
                    patience = 0.0 if is_loss_announced() else STOP_SECONDS
                    deadline = time.monotonic() + patience
                    self._news.set()
                    self.ask()
            if os.getppid() != self._parent:
                self._end(ORPHANED)
            if time.monotonic() > deadline:
                self._end(self.stop.exit_code)

    def _end(self, code: int) -> None:
        """Exit, but first save, or give a main thread that is already ending some time.

        Neither takes longer than `ending_seconds`.
        """
        if self.ending.acquire(timeout=self.ending_seconds):
            saving = threading.Thread(target=self.save, name="save", daemon=True)
            saving.start()
            saving.join(self.ending_seconds)
        os._exit(code)
