"""torchrun's workers, forked by a process that has imported torch.

torchrun starts a Python for every worker, and again whenever a machine is lost or
joins; importing torch was half of the time for which a training then stood still.
"""

import atexit
import contextlib
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch.distributed.elastic.multiprocessing.api as torchrun
from torch.distributed.elastic.multiprocessing.subprocess_handler import (
    SubprocessHandler,
)

from samestep.errors import WorkerFailed
from samestep.supervisor.forkserver_client import ForkServer


COMMAND = (sys.executable, "-u", "-m", "samestep.worker")
MODULE = "samestep.cli.worker"
"""The module whose `main` the command runs."""
STARTS = "get_subprocess_handler"
"""The name of torchrun's function that starts a process."""
LOST = 1
"""Stands for the exit code of a worker whose fork server was killed: it ends, too."""


def let_torchrun_fork() -> None:
    """Agent: fork samestep's workers; other commands start as before.

    torchrun has no option for this, so its function that starts a process is replaced.
    """
    setattr(torchrun, STARTS, partial(_Handler, _Forks()))


class _Forks:
    """The fork server, from the first worker to the end of the agent."""

    def __init__(self) -> None:
        self._server: ForkServer | None = None
        self._codes: dict[int, int] = {}

    def run(
        self, arguments: Sequence[str], env: Mapping[str, str], outputs: list[int]
    ) -> int:
        """Fork a worker; return its pid. Raises WorkerFailed."""
        if self._server is None:
            self._server = ForkServer()
            atexit.register(self._server.__exit__)
            self._server.__enter__()
        pid = self._server.run([MODULE, *arguments], dict(env), outputs)
        self._codes.pop(pid, None)  # of an earlier process of this number
        return pid

    def exit_code(self, pid: int, seconds: float) -> int | None:
        """Return that of a worker; None if it has none within `seconds`, or earlier."""
        assert self._server is not None
        if pid not in self._codes:
            try:
                self._codes |= dict(self._server.exits(seconds))
            except WorkerFailed:
                return LOST
        return self._codes.get(pid)


class _Process:
    """A forked worker, with what torchrun uses of a `subprocess.Popen`."""

    def __init__(self, forks: _Forks, pid: int) -> None:
        self.pid, self._forks = pid, forks

    def poll(self) -> int | None:
        """Return the exit code, or None while it runs."""
        return self._forks.exit_code(self.pid, 0.0)

    def wait(self, timeout: float = float("inf")) -> int:
        """Return the exit code. Raises subprocess.TimeoutExpired."""
        end = time.monotonic() + timeout
        while True:
            seconds = end - time.monotonic()
            code = self._forks.exit_code(self.pid, min(max(seconds, 0.0), 1.0))
            if code is not None:
                return code
            if seconds < 0:
                raise subprocess.TimeoutExpired(COMMAND, timeout)


class _Handler(SubprocessHandler):
    """torchrun's handler of a process, which forks if it can."""

    def __init__(self, forks: _Forks, **given: Any) -> None:
        self._forks = forks
        super().__init__(**given)

    def _popen(self, args: tuple[str, ...], env: dict[str, str]) -> Any:
        if args[: len(COMMAND)] != COMMAND:
            return super()._popen(args, env)
        outputs = [
            own.fileno() if own else descriptor
            for descriptor, own in enumerate((self._stdout, self._stderr), start=1)
        ]
        pid = self._forks.run(args[len(COMMAND) :], env, outputs)
        return _Process(self._forks, pid)

    def close(self, death_sig: signal.Signals | None = None) -> None:
        """Send a signal to the worker's process group, if it has not ended."""
        with contextlib.suppress(ProcessLookupError):
            super().close(death_sig)
