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
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from samestep import errors
from samestep.errors import SamestepError, WorkerFailed
from samestep.supervisor.forkserver_client import END_SECONDS, ForkServer, Message
from samestep.supervisor.hangs import Watch, is_stopped, where_it_hangs
from samestep.system import cache, machine
from samestep.system.heartbeat import STEP, Heartbeat
from samestep.system.resources import resources
from samestep.system.signals import Stop, how_it_ended


PRELOAD = {"shared": [], "gloo": ["torch._dynamo"], "nccl": ["torch._dynamo"]}
"""What the workers of an exchange import besides torch; DDP takes 0.9 s."""

POLL_SECONDS = 0.1
"""How often to look whether the workers make progress."""
STOP_SECONDS = 3.0
"""Deadline for the workers to finish their step and save it."""
GRACE_SECONDS = 1.0
"""How long to wait for the cause when a worker only reports that it lost a peer."""


@dataclass
class Worker:
    """One worker as the supervisor sees it."""

    rank: int
    pid: int
    control: socket.socket
    log: Path
    pidfd: int | None
    """Names this process even when its parent is gone and its id is used again."""
    buffer: bytes = b""
    is_silent: bool = False
    """Whether it has closed its end of the socket, as code in it may do."""
    exit_code: int | None = None
    failure: Message | None = None

    def receive(self) -> list[Message]:
        """The messages that have arrived; none at the end of the socket."""
        with contextlib.suppress(BlockingIOError):
            try:
                while data := self.control.recv(1 << 16):
                    self.buffer += data
            except ConnectionResetError:
                pass
            self.is_silent = True
        *lines, self.buffer = self.buffer.split(b"\n")
        return [json.loads(line) for line in lines]

    def kill(self) -> None:
        """Without the fork server. Elsewhere than on Linux, it notices that we left."""
        if self.pidfd is not None:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self.pidfd, signal.SIGKILL)

    def forget(self) -> None:
        """Closes the name of the process."""
        if self.pidfd is not None:
            os.close(self.pidfd)
        self.pidfd = None


def run_workers(
    server: ForkServer,
    job: Message,
    workers: int,
    logs: Path,
    listen: Callable[[Message], None],
    stop: Stop,
    memories: Mapping[str, int] | None = None,
) -> None:
    """Start `workers` processes on `job`, pass on what they say, wait for their end.

    `memories` are descriptors that outlive them, such as `snapshots`. Returns also when
    they were asked to stop and have stopped, or had to be killed. Raises the exception
    of the first failing worker: WorkerFailed, or the SamestepError it reported; its
    `details` tell the `step`. No worker is left when this returns or raises.
    """
    with ExitStack() as stack:
        fds, port = stack.enter_context(resources(job["exchange"], workers))
        heartbeat = Heartbeat(fds["board"])
        given = {**fds, **(memories or {})}
        crew = _start(server, job, workers, logs, given, port)
    timeouts = job["hang_timeout"], job["start_timeout"]
    supervision = _Supervision(server, crew, heartbeat, timeouts, listen, stop)
    try:
        listen({"type": "workers", "pids": [worker.pid for worker in crew]})
        supervision.run()
    finally:
        _end(server, crew)
        supervision.hear_last_words()


def _start(
    server: ForkServer,
    job: Message,
    workers: int,
    logs: Path,
    fds: dict[str, int],
    port: int,
) -> list[Worker]:
    crew: list[Worker] = []
    try:
        for rank in range(workers):
            ours, theirs = socket.socketpair()
            with theirs:
                log = logs / f"rank-{rank}.log"
                given = {"control": theirs.fileno(), **fds}
                if rank > 0:
                    given.pop("store", None)
                env = _environment(rank, workers, port)
                try:
                    pid = server.spawn(env, log, given, PRELOAD[job["exchange"]])
                except BaseException:
                    ours.close()
                    raise
            crew.append(Worker(rank, pid, ours, log, _pidfd(pid)))
            ours.sendall(json.dumps(job).encode() + b"\n")
            ours.setblocking(False)
    except BaseException:
        _end(server, crew)
        for worker in crew:
            worker.control.close()
        raise
    return crew


def _environment(rank: int, workers: int, port: int) -> dict[str, str]:
    """What torchrun would set, for one machine and the loopback interface.

    And our own cache: the fork server may be older than that setting.
    """
    ours = {name: os.environ[name] for name in (cache.VARIABLE,) if name in os.environ}
    return {
        **ours,
        "RANK": str(rank),
        "WORLD_SIZE": str(workers),
        "LOCAL_RANK": str(rank),
        "LOCAL_WORLD_SIZE": str(workers),
        "GROUP_RANK": "0",
        "GROUP_WORLD_SIZE": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "GLOO_SOCKET_IFNAME": machine.loopback(),
        "NCCL_SOCKET_IFNAME": machine.loopback(),
    }


@dataclass
class _Supervision:
    """Watches one crew until its end."""

    server: ForkServer
    crew: list[Worker]
    heartbeat: Heartbeat
    timeouts: tuple[float, float]
    """Of a step, and of each phase before the first one."""
    listen: Callable[[Message], None]
    stop: Stop
    _deadline: float = float("inf")
    """When the cause must be known, or the workers must have stopped."""

    def run(self) -> None:
        """Raises the exception of the first failing worker."""
        watch = Watch(self.heartbeat, *self.timeouts, self._is_stopped)
        with selectors.DefaultSelector() as selector:
            selector.register(self.server, selectors.EVENT_READ)
            for worker in self.crew:
                selector.register(worker.control, selectors.EVENT_READ, worker)
            while any(worker.exit_code is None for worker in self.crew):
                for key, _ in selector.select(POLL_SECONDS):
                    if key.data is not None:
                        self._pass_on(key.data)
                        if key.data.is_silent:  # or it would be readable for ever
                            selector.unregister(key.data.control)
                self._reap(selector)
                if _first_cause(self.crew) or time.monotonic() > self._deadline:
                    break
                if any(worker.failure for worker in self.crew):
                    self._expire(GRACE_SECONDS)
                elif self.stop.number is not None and not self.heartbeat.stop:
                    self.heartbeat.request_stop()
                    self._expire(STOP_SECONDS)
                elif late := watch.late():
                    self._name(late, watch)
                elif notice := watch.notice():
                    self.listen(notice)
        failed = _first_cause(self.crew) or next(
            (w for w in self.crew if w.failure), None
        )
        if failed:
            raise self._exception(failed)

    def hear_last_words(self) -> None:
        """What the workers said before they ended may be newer than their failure."""
        try:
            for worker in self.crew:
                self._pass_on(worker)
        finally:
            for worker in self.crew:
                worker.control.close()

    def _expire(self, seconds: float) -> None:
        self._deadline = min(self._deadline, time.monotonic() + seconds)

    def _pass_on(self, worker: Worker) -> None:
        for message in worker.receive():
            if message["type"] == "failed":
                worker.failure = message
            else:
                self.listen(message)

    def _reap(self, selector: selectors.BaseSelector) -> None:
        for pid, code in self.server.exits():
            worker = next((w for w in self.crew if w.pid == pid), None)
            if worker is None:  # of an earlier crew, killed long ago
                continue
            self._pass_on(worker)  # its last words may still be in the socket
            worker.exit_code = code
            with contextlib.suppress(KeyError):
                selector.unregister(worker.control)
            if code != 0 and worker.failure is None:
                how = how_it_ended(code)
                worker.failure = {"error": "WorkerFailed", "message": how, "code": code}

    def _is_stopped(self, rank: int) -> bool:
        return is_stopped(self.crew[rank].pid)

    def _name(self, late: list[int], watch: Watch) -> None:
        """Blames the workers that hang, and shows where."""
        how, stacks = [], ""
        blamed = [self.crew[rank] for rank in late]
        # Who was stopped inside an exchange has reached it, like those who wait there.
        for worker in [w for w in blamed if is_stopped(w.pid)] or blamed:
            stacks += where_it_hangs(self.server, worker.pid, worker.log)
            suffix = " (stopped by a signal)" if is_stopped(worker.pid) else ""
            how.append(f"{worker.rank}{suffix}")
        message = watch.complaint(", ".join(how))
        failure = {"error": "WorkerLate", "message": message, "traceback": stacks}
        worker.failure = failure

    def _exception(self, worker: Worker) -> SamestepError:
        """The worker's own SamestepError, or a WorkerFailed with its traceback."""
        assert worker.failure is not None
        error = exception(worker.failure, worker.rank)
        step = max(cell[STEP] for cell in self.heartbeat.workers())
        where = {"log": str(worker.log), "step": step, "phase": self.heartbeat.phase}
        error.details = {**error.details, **where}
        return error


def exception(failure: Message, rank: int) -> SamestepError:
    """From what a worker said before it ended, or what its end looks like."""
    kind = getattr(errors, failure["error"], None)
    if kind is not None and kind is not WorkerFailed:
        error: SamestepError = kind(failure["message"])
    else:
        error = WorkerFailed(f"Worker {rank} failed: {failure['message']}.")
    error.details = {
        "rank": rank,
        "code": failure.get("code"),
        "traceback": failure.get("traceback"),
    }
    if failure.get("own"):
        error.add_note(failure["own"])
    return error


def _end(server: ForkServer, crew: list[Worker]) -> None:
    """Kills the workers that are left and waits until they have been reaped."""
    left = {worker.pid for worker in crew if worker.exit_code is None}
    deadline = time.monotonic() + END_SECONDS
    try:
        for pid in left:
            server.kill(pid)
        while left and time.monotonic() < deadline:
            left -= {pid for pid, _ in server.exits(seconds=0.1)}
    except WorkerFailed:  # the server has ended: its workers are nobody's children
        for worker in crew:
            worker.kill()
    finally:
        for worker in crew:
            worker.forget()


def _pidfd(pid: int) -> int | None:
    if not hasattr(os, "pidfd_open"):
        return None
    with contextlib.suppress(OSError):  # it has already ended and been reaped
        return os.pidfd_open(pid)
    return None


def _first_cause(crew: list[Worker]) -> Worker | None:
    """A failed worker that did not merely lose a peer."""
    return next(
        (w for w in crew if w.failure and w.failure["error"] != "PeerLost"), None
    )
