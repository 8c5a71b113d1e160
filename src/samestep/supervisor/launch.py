"""Start the workers of one machine, pass on their messages, and end them.

Everything stays on the loopback interface. The rendezvous store listens on a socket
that the supervisor bound to 127.0.0.1 at a port the kernel chose, so no port can be
occupied or seen from outside. The supervisor does not import torch.
"""

import contextlib
import os
import selectors
import socket
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from samestep import errors
from samestep.errors import SamestepError, WorkerFailed
from samestep.files import cache
from samestep.kernels import library as kernels
from samestep.messages import wire
from samestep.messages.job import Job, Setup
from samestep.messages.training import (
    Failed,
    Message,
    SnapshotSaved,
    WorkersStarted,
)
from samestep.supervisor.forkserver_client import END_SECONDS, ForkServer
from samestep.supervisor.hangs import HangDetector, is_stopped, where_it_hangs
from samestep.system import machine
from samestep.system.heartbeat import STEP, Heartbeat
from samestep.system.resources import resources
from samestep.system.signals import Stop, how_it_ended


PRELOAD = {"shared": [], "gloo": ["torch._dynamo"], "nccl": ["torch._dynamo"]}
"""Modules that the workers of an exchange import besides torch; DDP takes 0.9 s."""

POLL_SECONDS = 0.1
"""Seconds between two checks whether the workers make progress."""
STOP_SECONDS = 3.0
"""Deadline for the workers to finish their step and save it."""
GRACE_SECONDS = 1.0
"""How long to wait for the cause when a worker only reports that it lost a peer."""


@dataclass
class Worker:
    """One worker as the supervisor sees it."""

    rank: int
    pid: int
    """0: not started yet."""
    control: socket.socket
    log: Path
    buffer: bytes = b""
    is_closed: bool = False
    """Whether it has closed its end of the socket, as code in it may do."""
    exit_code: int | None = None
    failure: Failed | None = None

    def receive(self) -> list[Message]:
        """Return the messages that have arrived. Raises WorkerFailed if one is damaged.

        Sets `is_closed` at the end of the socket.
        """
        with contextlib.suppress(BlockingIOError):
            try:
                while data := self.control.recv(1 << 16):
                    self.buffer += data
            except ConnectionResetError:
                pass
            self.is_closed = True
        *lines, self.buffer = self.buffer.split(b"\n")
        return [wire.decode(line, Message) for line in lines]


def run_workers(
    server: ForkServer,
    job: Job,
    workers: int,
    logs: Path,
    listen: Callable[[Message], None],
    stop: Stop,
    memories: Mapping[str, int] | None = None,
) -> None:
    """Start `workers` processes on `job`, pass on their messages, wait for their end.

    `memories` are descriptors that outlive the workers, such as `snapshots`. Returns
    also when the workers were asked to stop and have stopped, or had to be killed.
    Raises the exception of the first worker that failed: WorkerFailed, or the
    SamestepError that it reported, with the `step` in its `details`. No worker is left
    when this returns or raises.
    """
    with resources(job.setup.exchange, workers) as (fds, port):
        heartbeat = Heartbeat(fds["heartbeat"])
        inherited = {**fds, **(memories or {})}
        group = _start(server, job, workers, logs, inherited, port)
    supervision = _Supervision(server, group, heartbeat, job.setup, listen, stop)
    try:
        listen(WorkersStarted(pids=[worker.pid for worker in group]))
        supervision.run()
    finally:
        _end(server, group)
        supervision.receive_rest()


def _start(
    server: ForkServer,
    job: Job,
    workers: int,
    logs: Path,
    fds: dict[str, int],
    port: int,
) -> list[Worker]:
    preload, line = PRELOAD[job.setup.exchange], wire.encode(job)
    if job.setup.recipe["optimizer"]["name"] == "custom":
        preload = ["torch._dynamo"]  # as an optimizer of torch does
    group: list[Worker] = []
    try:
        for rank in range(workers):
            ours, theirs = socket.socketpair()
            group.append(Worker(rank, 0, ours, logs / f"rank-{rank}.log"))
            inherited = {"control": theirs.fileno(), **fds}
            if rank > 0:
                inherited.pop("store", None)
            env = _environment(rank, workers, port)
            with theirs:
                group[-1].pid = server.spawn(env, group[-1].log, inherited, preload)
            ours.sendall(line)
            ours.setblocking(False)
    except BaseException:
        _end(server, [worker for worker in group if worker.pid])
        for worker in group:
            worker.control.close()
        raise
    return group


def _environment(rank: int, workers: int, port: int) -> dict[str, str]:
    """Return what torchrun would set, for one machine and the loopback interface.

    The directory of our cache and the kernels' instruction set are passed on, too: they
    may have been set after the fork server was started.
    """
    names = (cache.VARIABLE, kernels.VARIABLE)
    return {
        **{name: os.environ[name] for name in names if name in os.environ},
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
    """Watches the workers of one generation until their end."""

    server: ForkServer
    group: list[Worker]
    heartbeat: Heartbeat
    setup: Setup
    listen: Callable[[Message], None]
    stop: Stop
    _deadline: float = float("inf")
    """When the cause must be known, or the workers must have stopped."""

    def run(self) -> None:
        """Wait for the end of all workers.

        Raises the exception of the first worker that failed.
        """
        detector = HangDetector(
            self.heartbeat,
            self.setup.hang_timeout,
            self.setup.start_timeout,
            lambda rank: is_stopped(self.group[rank].pid),
        )
        with selectors.DefaultSelector() as selector:
            selector.register(self.server, selectors.EVENT_READ)
            for worker in self.group:
                selector.register(worker.control, selectors.EVENT_READ, worker)
            while any(worker.exit_code is None for worker in self.group):
                for key, _ in selector.select(POLL_SECONDS):
                    if key.data is not None:
                        self._pass_on(key.data)
                        if key.data.is_closed:  # it would be readable for ever
                            selector.unregister(key.data.control)
                self._reap(selector)
                if _first_cause(self.group) or time.monotonic() > self._deadline:
                    break
                if any(worker.failure for worker in self.group):
                    self._expire(GRACE_SECONDS)
                elif self.stop.number is not None and not self.heartbeat.stop:
                    self.heartbeat.request_stop()
                    self._expire(STOP_SECONDS)
                elif late := detector.late():
                    self._blame(late, detector)
                elif slow_start := detector.slow_start():
                    self.listen(slow_start)
        failed = _first_cause(self.group) or next(
            (w for w in self.group if w.failure), None
        )
        if failed:
            raise self._exception(failed)

    def receive_rest(self) -> None:
        """Pass on what workers sent before their end, and close their sockets.

        A snapshot among that may be newer than the failure.
        """
        try:
            for worker in self.group:
                self._pass_on(worker)
        finally:
            for worker in self.group:
                worker.control.close()

    def _expire(self, seconds: float) -> None:
        self._deadline = min(self._deadline, time.monotonic() + seconds)

    def _pass_on(self, worker: Worker) -> None:
        try:
            messages = worker.receive()
        except WorkerFailed as error:  # an undecodable line
            worker.failure = Failed(error="WorkerFailed", message=str(error))
            return
        for message in messages:
            if isinstance(message, Failed):
                worker.failure = message
            else:
                self.listen(message)
                if isinstance(message, SnapshotSaved):
                    self.heartbeat.handle(message.step)

    def _reap(self, selector: selectors.BaseSelector) -> None:
        for pid, code in self.server.exits():
            worker = next((w for w in self.group if w.pid == pid), None)
            if worker is None:  # of an earlier generation, killed long ago
                continue
            self._pass_on(worker)  # its failure may still be in the socket
            worker.exit_code = code
            with contextlib.suppress(KeyError):
                selector.unregister(worker.control)
            if code != 0 and worker.failure is None:
                how = how_it_ended(code)
                worker.failure = Failed(error="WorkerFailed", message=how, code=code)

    def _blame(self, late: list[int], detector: HangDetector) -> None:
        """Record as a failure that workers hang, and where."""
        titles, stacks = [], ""
        suspects = [self.group[rank] for rank in late]
        # A worker that was stopped inside an exchange has come as far as those that
        # wait for it there, so the heartbeat alone does not tell them apart.
        for worker in [w for w in suspects if is_stopped(w.pid)] or suspects:
            stacks += where_it_hangs(self.server, worker.pid, worker.log)
            suffix = " (stopped by a signal)" if is_stopped(worker.pid) else ""
            titles.append(f"{worker.rank}{suffix}")
        message = detector.complaint(", ".join(titles))
        worker.failure = Failed(error="WorkerLate", message=message, traceback=stacks)

    def _exception(self, worker: Worker) -> SamestepError:
        """Return the worker's own SamestepError, or a WorkerFailed."""
        assert worker.failure is not None
        error = exception(worker.failure, worker.rank)
        step = max(cell[STEP] for cell in self.heartbeat.workers())
        error.details = {
            **error.details,
            "log": str(worker.log),
            "step": step,
            "phase": self.heartbeat.phase,
        }
        return error


def exception(failure: Failed, rank: int) -> SamestepError:
    """Return the exception of a worker that failed."""
    kind = getattr(errors, failure.error, None)
    if kind is not None and kind is not WorkerFailed:
        error: SamestepError = kind(failure.message)
    else:
        error = WorkerFailed(f"Worker {rank} failed: {failure.message}.")
    error.details = {
        "rank": rank,
        "code": failure.code,
        "traceback": failure.traceback,
    }
    if failure.own:
        error.add_note(failure.own)
    return error


def _end(server: ForkServer, group: list[Worker]) -> None:
    """Kill the workers that are left and wait until they have been reaped."""
    left = {worker.pid for worker in group if worker.exit_code is None}
    deadline = time.monotonic() + END_SECONDS
    try:
        for pid in left:
            server.kill(pid)
        while left and time.monotonic() < deadline:
            left -= {pid for pid, _ in server.exits(seconds=0.1)}
    except WorkerFailed:
        return  # the server has ended, and on Linux they end with it


def _first_cause(group: list[Worker]) -> Worker | None:
    """Return a worker that failed for another reason than that it lost a peer."""
    return next((w for w in group if w.failure and w.failure.error != "PeerLost"), None)
