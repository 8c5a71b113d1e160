"""The supervisor: starts the workers of one machine, listens to them, ends them.

Everything stays on the loopback interface. The rendezvous store listens on a socket
that the supervisor bound to 127.0.0.1 at a port the kernel chose, so no port can be
occupied or seen from outside. The supervisor does not import torch.
"""

import contextlib
import json
import os
import selectors
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from samestep import barrier, errors
from samestep.errors import SamestepError, WorkerFailed


Message = dict[str, Any]

PRELOAD = {"shared": [], "gloo": ["torch._dynamo"]}
"""What the workers of an exchange import besides torch; DDP takes 0.9 s."""

START_SECONDS = 120.0
"""Deadline for importing torch and forking a worker."""
GRACE_SECONDS = 1.0
"""How long to wait for the cause when a worker only reports that it lost a peer."""
END_SECONDS = 10.0
"""Deadline for the fork server to kill and reap its workers."""


@dataclass
class Worker:
    """One worker as the supervisor sees it."""

    rank: int
    pid: int
    control: socket.socket
    log: Path
    buffer: bytes = b""
    exit_code: int | None = None
    failure: Message | None = None

    def receive(self) -> list[Message]:
        """The messages that have arrived; none at the end of the socket."""
        with contextlib.suppress(BlockingIOError, ConnectionResetError):
            while data := self.control.recv(1 << 16):
                self.buffer += data
        *lines, self.buffer = self.buffer.split(b"\n")
        return [json.loads(line) for line in lines]


@dataclass
class ForkServer:
    """The supervisor's side of `samestep.forkserver`; leaving it ends all workers."""

    _channel: socket.socket = field(init=False)
    _process: subprocess.Popen[bytes] = field(init=False)
    _buffer: bytes = b""
    _inbox: list[Message] = field(default_factory=list)
    _has_spawned: bool = False

    def __enter__(self) -> Self:
        self._channel, theirs = socket.socketpair()
        with theirs:
            # A session of its own: Ctrl-C reaches the supervisor, which ends the rest.
            self._process = subprocess.Popen(  # noqa: S603
                [
                    sys.executable,
                    "-P",
                    "-m",
                    "samestep.forkserver",
                    str(theirs.fileno()),
                ],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=sys.stderr.fileno() if _has_fileno(sys.stderr) else None,
                start_new_session=True,
            )
        return self

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
        """For a selector: readable when a worker has exited."""
        return self._channel.fileno()

    def spawn(
        self, env: dict[str, str], log: Path, fds: dict[str, int], preload: list[str]
    ) -> int:
        """The process id of a new worker that inherits `fds`. Raises WorkerFailed.

        The server first imports the modules `preload`, so that no worker needs to.
        """
        self._has_spawned = True
        request = {
            "env": env,
            "log": str(log),
            "names": list(fds),
            "preload": preload,
        }
        line = json.dumps({"spawn": request}).encode() + b"\n"
        socket.send_fds(self._channel, [line], list(fds.values()))
        deadline = time.monotonic() + START_SECONDS
        while not (spawned := self._take("spawned")):
            if time.monotonic() > deadline:
                raise WorkerFailed(
                    f"A worker must start within {START_SECONDS:.0f} s; it did not. "
                    "Is the machine out of memory or processes?"
                )
            self._receive(deadline - time.monotonic())
        return int(spawned[0]["spawned"])

    def kill(self, pid: int) -> None:
        """SIGKILL, if that worker has not been reaped."""
        with contextlib.suppress(BrokenPipeError):
            self._channel.sendall(json.dumps({"kill": pid}).encode() + b"\n")

    def exits(self, seconds: float = 0.0) -> list[tuple[int, int]]:
        """(process id, exit code) of workers that have ended since the last call.

        Waits for news at most `seconds`. Raises WorkerFailed if the server has ended.
        """
        self._receive(seconds)
        return [(m["exited"], m["code"]) for m in self._take("exited")]

    def _take(self, key: str) -> list[Message]:
        taken = [message for message in self._inbox if key in message]
        self._inbox = [message for message in self._inbox if key not in message]
        return taken

    def _receive(self, seconds: float) -> None:
        self._channel.settimeout(max(0.001, seconds))
        try:
            data = self._channel.recv(1 << 16)
        except TimeoutError:
            return
        if not data:
            raise WorkerFailed(
                "The process that forks the workers has ended; its error is above."
            )
        *lines, self._buffer = (self._buffer + data).split(b"\n")
        self._inbox += map(json.loads, lines)


def run_workers(
    server: ForkServer,
    job: Message,
    workers: int,
    logs: Path,
    listen: Callable[[Message], None],
) -> None:
    """Start `workers` processes on `job`, pass on what they say, wait for their end.

    Raises the exception of the first failing worker: WorkerFailed, or the SamestepError
    it reported. No worker is left when this returns or raises.
    """
    crew = _start(server, job, workers, logs)
    listen({"type": "workers", "pids": [worker.pid for worker in crew]})
    try:
        _supervise(server, crew, listen)
    finally:
        _end(server, crew)


def _start(server: ForkServer, job: Message, workers: int, logs: Path) -> list[Worker]:
    with _resources(job["exchange"], workers) as (shared, port):
        crew = []
        for rank in range(workers):
            ours, theirs = socket.socketpair()
            with theirs:
                log = logs / f"rank-{rank}.log"
                fds = {"control": theirs.fileno(), **shared}
                if rank > 0:
                    fds.pop("store", None)
                env = _environment(rank, workers, port)
                pid = server.spawn(env, log, fds, PRELOAD[job["exchange"]])
                worker = Worker(rank, pid, ours, log)
            crew.append(worker)
            ours.sendall(json.dumps(job).encode() + b"\n")
            ours.setblocking(False)
    return crew


@contextmanager
def _resources(exchange: str, workers: int) -> Iterator[tuple[dict[str, int], int]]:
    """Descriptors for the workers, and the port of the store if there is one.

    `memory`: a nameless shared object; `store`: a listening socket, for rank 0.
    """
    if exchange == "shared":
        memory = barrier.create(workers)
        try:
            yield {"memory": memory}, 0
        finally:
            os.close(memory)
    else:
        with socket.create_server(("127.0.0.1", 0)) as store:
            yield {"store": store.fileno()}, store.getsockname()[1]


def _environment(rank: int, workers: int, port: int) -> dict[str, str]:
    """What torchrun would set, for one machine and the loopback interface."""
    interfaces = {name for _, name in socket.if_nameindex()}
    return {
        "RANK": str(rank),
        "WORLD_SIZE": str(workers),
        "LOCAL_RANK": str(rank),
        "LOCAL_WORLD_SIZE": str(workers),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "GLOO_SOCKET_IFNAME": "lo" if "lo" in interfaces else "lo0",  # lo0: macOS
    }


def _supervise(
    server: ForkServer, crew: list[Worker], listen: Callable[[Message], None]
) -> None:
    by_pid = {worker.pid: worker for worker in crew}
    deadline = float("inf")
    with selectors.DefaultSelector() as selector:
        selector.register(server, selectors.EVENT_READ)
        for worker in crew:
            selector.register(worker.control, selectors.EVENT_READ, worker)
        while any(worker.exit_code is None for worker in crew):
            events = selector.select(max(0.0, min(1.0, deadline - time.monotonic())))
            for key, _ in events:
                if key.data is not None:
                    _pass_on(key.data, listen)
            for pid, code in server.exits():
                _note_exit(by_pid[pid], code, selector, listen)
            cause = _first_cause(crew)
            if cause or time.monotonic() > deadline:
                break
            if any(worker.failure for worker in crew):
                deadline = min(deadline, time.monotonic() + GRACE_SECONDS)
    failed = _first_cause(crew) or next((w for w in crew if w.failure), None)
    if failed:
        raise _exception(failed)


def _end(server: ForkServer, crew: list[Worker]) -> None:
    """Kills the workers that are left and waits until they have been reaped."""
    left = {worker.pid for worker in crew if worker.exit_code is None}
    for worker in crew:
        worker.control.close()
    deadline = time.monotonic() + END_SECONDS
    with contextlib.suppress(WorkerFailed):  # without its server, a worker ends itself
        for pid in left:
            server.kill(pid)
        while left and time.monotonic() < deadline:
            left -= {pid for pid, _ in server.exits(seconds=0.1)}


def _pass_on(worker: Worker, listen: Callable[[Message], None]) -> None:
    for message in worker.receive():
        if message["type"] == "failed":
            worker.failure = message
        else:
            listen(message)


def _note_exit(
    worker: Worker,
    code: int,
    selector: selectors.BaseSelector,
    listen: Callable[[Message], None],
) -> None:
    _pass_on(worker, listen)  # its last words may still be in the socket
    worker.exit_code = code
    selector.unregister(worker.control)
    if code != 0 and worker.failure is None:
        worker.failure = {"error": "WorkerFailed", "message": _how_it_ended(code)}


def _how_it_ended(code: int) -> str:
    if code >= 0:
        return f"it exited with code {code} without an error message"
    name = signal.Signals(-code).name
    hint = " (the kernel does so when memory runs out)" if name == "SIGKILL" else ""
    return f"it was killed by {name}{hint}"


def _first_cause(crew: list[Worker]) -> Worker | None:
    """A failed worker that did not merely lose a peer."""
    return next(
        (w for w in crew if w.failure and w.failure["error"] != "PeerLost"), None
    )


def _exception(worker: Worker) -> SamestepError:
    """The worker's own SamestepError, or a WorkerFailed with its traceback."""
    assert worker.failure is not None
    kind = getattr(errors, worker.failure["error"], None)
    message = worker.failure["message"]
    if kind is not None and kind is not WorkerFailed:
        error: SamestepError = kind(message)
    else:
        error = WorkerFailed(f"Worker {worker.rank} failed: {message}.")
    details = {"rank": worker.rank, "log": str(worker.log)}
    error.details = details | {"traceback": worker.failure.get("traceback")}
    return error


def _has_fileno(stream: Any) -> bool:
    """Notebooks and tests replace the standard streams by objects without one."""
    with contextlib.suppress(AttributeError, OSError, ValueError):
        return os.fstat(stream.fileno()) is not None
    return False
