"""The supervisor's side of `samestep.training.forkserver`; it does not import torch."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self, TextIO, TypeVar

from samestep.errors import OutputError, WorkerFailed
from samestep.files import untrusted
from samestep.messages import wire
from samestep.messages.processes import (
    Answer,
    BuildKnown,
    Exited,
    FindGpus,
    GpusFound,
    Request,
    SendSignal,
    Spawn,
    Spawned,
)
from samestep.system.machine import Gpus
from samestep.system.signals import how_it_ended


T = TypeVar("T", BuildKnown, Exited, GpusFound, Spawned)

START_SECONDS = 120.0
"""Deadline for importing torch and forking a worker."""
END_SECONDS = 10.0
"""Deadline for the fork server to kill and reap its workers."""


@dataclass
class ForkServer:
    """The supervisor's side of `training.forkserver`. Leaving it ends all workers."""

    _channel: socket.socket = field(init=False)
    _process: subprocess.Popen[bytes] = field(init=False)
    _buffer: bytes = b""
    _inbox: list[Answer] = field(default_factory=list)
    _has_spawned: bool = False
    _has_ended: bool = False
    _build: dict[str, str] = field(default_factory=dict)
    _gpus: Gpus | None = None

    def __enter__(self) -> Self:
        self._start()
        return self

    def _start(self) -> None:
        self._channel, theirs = socket.socketpair()
        self._buffer, self._inbox = b"", []
        self._has_spawned = self._has_ended = False
        with theirs:
            # In a session of its own, so that Ctrl-C only reaches the supervisor,
            # which then ends the workers in order.
            self._process = subprocess.Popen(  # noqa: S603
                [
                    sys.executable,
                    "-P",
                    "-m",
                    "samestep.training.forkserver",
                    str(theirs.fileno()),
                    str(os.getpid()),
                ],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=sys.stderr.fileno() if _has_fileno(sys.stderr) else None,
                # The order of a set of strings may decide bits.
                env={**os.environ, "PYTHONHASHSEED": "0"},
                start_new_session=True,
            )

    def __exit__(self, *_: object) -> None:
        self._channel.close()
        if not self._has_spawned:
            self._process.kill()  # it may still be importing torch
        try:
            self._process.wait(END_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def fileno(self) -> int:
        """Return a descriptor that is readable when a worker has exited."""
        return self._channel.fileno()

    def spawn(
        self, env: dict[str, str], log: Path, fds: dict[str, int], preload: list[str]
    ) -> int:
        """Fork a worker that inherits `fds` and prints into `log`; return its pid.

        The server first imports the modules `preload`, so that no worker needs to. If
        it has ended, another one is started. Raises WorkerFailed, OutputError.
        """
        with _opened(log) as output:
            inherited = {**fds, "stdout": output, "stderr": output}
            request = Spawn(env=env, names=list(inherited), preload=preload)
            return self._spawn(request, list(inherited.values()))

    def run(self, command: list[str], env: dict[str, str], outputs: list[int]) -> int:
        """Fork a process in which the `main` of a module runs; return its pid.

        `command` is the module and the arguments, `outputs` are stdout and stderr. The
        process leads a group, and outlives the server. Raises WorkerFailed.
        """
        request = Spawn(
            env=env, names=["stdout", "stderr"], preload=command[:1], command=command
        )
        return self._spawn(request, outputs)

    def _spawn(self, request: Spawn, fds: list[int]) -> int:
        self._revive()
        self._has_spawned = True
        socket.send_fds(self._channel, [wire.encode(request)], fds)
        return self._await(Spawned).pid

    def _revive(self) -> None:
        if self._has_ended or self._process.poll() is not None:
            self.__exit__()
            self._start()

    def send_signal(self, pid: int, number: int) -> None:
        """Send a signal to a worker, if it has not been reaped."""
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            self._send(SendSignal(pid=pid, number=number))

    def kill(self, pid: int) -> None:
        """Kill a worker, if it has not been reaped."""
        self.send_signal(pid, signal.SIGKILL)

    def build(self, device: str = "cpu") -> dict[str, str]:
        """Return what decides bits besides the recipe: `torch`, `instruction_set`, ...

        A GPU is named as `device`, the CPU is not. Waits until torch has been imported.
        If the server has ended, another one is started. Raises WorkerFailed.
        """
        if not self._build:
            self._revive()
            self._build = self._await(BuildKnown).build
        gpu = {} if device == "cpu" else {"device": self.device(device)}
        return self._build | gpu

    def device(self, device: str) -> str:
        """Return `cpu`, or `cuda` with the names of all that decides its bits."""
        return "cpu" if device == "cpu" else f"{device}: {self.gpus().title}"

    def gpus(self) -> Gpus:
        """Return the GPUs for workers. Waits for torch. Raises WorkerFailed."""
        if self._gpus is None:
            self._revive()
            self._send(FindGpus())
            self._gpus = self._await(GpusFound).gpus
        return self._gpus

    def exits(self, seconds: float = 0.0) -> list[tuple[int, int]]:
        """Return (pid, exit code) of the workers that ended since the last call.

        Waits for a message for at most `seconds`. Raises WorkerFailed if the server has
        ended.
        """
        self._receive(seconds)
        return [(exited.pid, exited.code) for exited in self._take(Exited)]

    def _send(self, request: Request) -> None:
        self._channel.sendall(wire.encode(request))

    def _await(self, kind: type[T]) -> T:
        deadline = time.monotonic() + START_SECONDS
        while not (answers := self._take(kind)):
            if time.monotonic() > deadline:
                raise WorkerFailed(
                    f"A worker must start within {START_SECONDS:.0f} s; it did not. "
                    "Is the machine out of memory or processes?"
                )
            self._receive(deadline - time.monotonic())
        return answers[0]

    def _take(self, kind: type[T]) -> list[T]:
        taken = [answer for answer in self._inbox if isinstance(answer, kind)]
        self._inbox = [each for each in self._inbox if not isinstance(each, kind)]
        return taken

    def _receive(self, seconds: float) -> None:
        self._channel.settimeout(max(0.001, seconds))
        try:
            data = self._channel.recv(1 << 16)
        except TimeoutError:
            return
        except ConnectionResetError:  # it was killed before it read what we had sent
            data = b""
        if not data:
            self._has_ended = True
            raise self._failure()
        *lines, self._buffer = (self._buffer + data).split(b"\n")
        self._inbox += [wire.decode(line, Answer) for line in lines]

    def _failure(self) -> WorkerFailed:
        """Return the exception that says why the server has ended."""
        try:
            code = self._process.wait(END_SECONDS)
            how = "its error is above" if code > 0 else how_it_ended(code)
        except subprocess.TimeoutExpired:
            code, how = None, "it closed its connection"
        error = WorkerFailed(f"The process that forks the workers has ended: {how}.")
        error.details = {"code": code}
        return error


@contextlib.contextmanager
def _opened(log: Path) -> Iterator[int]:
    """Open a worker's log; the run may come from elsewhere. Raises OutputError."""
    try:
        fd = untrusted.open_to_append(log, log.parent.parent)
    except OSError as error:
        raise OutputError(
            f"A worker prints into {log}, which cannot be written: {error.strerror}. "
            "Remove it, or make it writable."
        ) from None
    try:
        yield fd
    finally:
        os.close(fd)


def _has_fileno(stream: TextIO) -> bool:
    """Return whether a stream has a descriptor; in notebooks and tests it may not."""
    with contextlib.suppress(AttributeError, OSError, ValueError):
        return os.fstat(stream.fileno()) is not None
    return False


def given_or_new(
    server: ForkServer | None,
) -> contextlib.AbstractContextManager[ForkServer]:
    """Return the given server, which keeps running, or one for this call."""
    return ForkServer() if server is None else contextlib.nullcontext(server)
