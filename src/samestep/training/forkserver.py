"""A process that has imported torch once and forks workers on request.

Importing torch takes two seconds; a fork of a process that has done so takes some 20
ms, and shares the memory of the libraries. `python -m samestep.training.forkserver FD
PARENT` exchanges the messages of `messages.processes` with the process PARENT, over the
Unix socket FD. It first sends `BuildKnown`.

At the end of the socket, however its other side ended, it kills all workers with
SIGKILL; torchrun's, which save what they can, end by themselves. The process imports
torch, starts no thread and does not initialise CUDA, which makes the forks safe.
"""

import contextlib
import gc
import importlib
import io
import os
import selectors
import signal
import socket
import sys
import time
import traceback
from pathlib import Path
from typing import NoReturn

from samestep.system.signals import end_alone, end_with


if __name__ == "__main__":
    # Until the end of the channel can be noticed: importing torch takes seconds.
    end_with(int(sys.argv[2]))
    gc.disable()  # modules stay, so collections between imports find little

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
from samestep.models import device
from samestep.models.compiling import own_directory
from samestep.system.machine import Gpus
from samestep.system.signals import EXIT_CODES
from samestep.training import worker


MAX_FDS = 8
GPU_SECONDS = 60.0
"""Deadline for CUDA to start and name its devices."""


class ForkServer:
    """Forks workers, reaps them, and kills them when the supervisor has ended."""

    def __init__(self, channel: socket.socket) -> None:
        self._channel = channel
        self._buffer = b""
        self._fds: list[int] = []
        self._children: dict[int, Spawn] = {}
        self._wakeup_in, self._wakeup_out = socket.socketpair()
        self._wakeup_in.setblocking(False)
        self._wakeup_out.setblocking(False)

    def serve(self) -> None:
        """Carry out requests until the supervisor ends."""
        self._send(BuildKnown(build=device.build()))
        signal.signal(signal.SIGCHLD, lambda *_: None)
        # A scheduler sends these to all processes of a job. Blocked, not ignored: what
        # a new worker gets before it unblocks them is kept for it.
        signal.pthread_sigmask(signal.SIG_BLOCK, EXIT_CODES)
        signal.set_wakeup_fd(self._wakeup_in.fileno())
        selector = selectors.DefaultSelector()
        selector.register(self._channel, selectors.EVENT_READ)
        selector.register(self._wakeup_out, selectors.EVENT_READ)
        try:
            while True:
                for key, _ in selector.select():
                    if key.fileobj is self._wakeup_out:
                        self._reap()
                    elif not self._read():
                        return
        finally:
            self._kill_all()

    def _send(self, answer: Answer) -> None:
        # If the supervisor has ended, `_read` notices soon enough.
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            self._channel.sendall(wire.encode(answer))

    def _read(self) -> bool:
        """Carry out what has arrived; return False at the end of the channel."""
        try:
            data, fds, _, _ = socket.recv_fds(self._channel, 1 << 16, MAX_FDS)
        except ConnectionResetError:  # it left without reading what we had sent
            return False
        self._fds += fds
        self._buffer += data
        *lines, self._buffer = self._buffer.split(b"\n")
        for line in lines:
            self._carry_out(wire.decode(line, Request))
        return bool(data)

    def _carry_out(self, request: Request) -> None:
        match request:
            case Spawn():
                self._spawn(request)
            case FindGpus():
                self._find_gpus()
            case SendSignal(pid=pid, number=number):
                if pid in self._children:  # never a process id that was reused
                    os.kill(pid, number)

    def _spawn(self, request: Spawn) -> None:
        for module in request.preload:
            importlib.import_module(module)
        names = request.names
        fds, self._fds = self._fds[: len(names)], self._fds[len(names) :]
        server = os.getpid()
        pid = os.fork()
        if pid == 0:
            if not request.command:
                end_with(server)
            self._become_worker(request, dict(zip(names, fds, strict=True)))
        if request.command:
            os.setpgid(pid, pid)
        for fd in fds:
            os.close(fd)
        self._children[pid] = request
        self._send(Spawned(pid=pid))

    def _find_gpus(self) -> None:
        """Look for GPUs in a child: no process forked after CUDA starts can use it."""
        pid = os.fork()
        if pid == 0:
            try:
                self._send(GpusFound(gpus=device.gpus()))
                os._exit(0)
            except BaseException:
                traceback.print_exc()
                os._exit(1)
        if why := _failure_of(pid):
            self._send(GpusFound(gpus=Gpus(why=why)))

    def _become_worker(self, request: Spawn, fds: dict[str, int]) -> None:
        code = 1
        try:
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, EXIT_CODES)
            for own in (self._channel, self._wakeup_in, self._wakeup_out):
                own.close()
            # Also for what native libraries print.
            for descriptor, name in enumerate(("stdout", "stderr"), start=1):
                os.dup2(fds[name], descriptor)
                os.close(fds.pop(name))
            os.environ.update(request.env)
            if request.command:
                _run(request.command)
            code = worker.main(fds)
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)  # skips the clean-up of a server that this is not

    def _reap(self) -> None:
        with contextlib.suppress(BlockingIOError):
            self._wakeup_out.recv(4096)
        for pid in list(self._children):
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                del self._children[pid]
                code = os.waitstatus_to_exitcode(status)
                self._send(Exited(pid=pid, code=code))

    def _kill_all(self) -> None:
        workers = [pid for pid, own in self._children.items() if not own.command]
        for pid in workers:
            os.kill(pid, signal.SIGKILL)
        for pid in workers:
            os.waitpid(pid, 0)


def _run(command: list[str]) -> NoReturn:
    """Run a module's `main`, which ends the process, as `python -u -m` would."""
    if not os.environ.get("PYTHONSAFEPATH"):
        sys.path.insert(0, str(Path.cwd()))
    for stream in (sys.stdout, sys.stderr):
        assert isinstance(stream, io.TextIOWrapper)
        stream.reconfigure(line_buffering=True)
    sys.argv = command
    importlib.import_module(command[0]).main()
    raise AssertionError


def _failure_of(pid: int) -> str:
    """Wait for the child that looks for GPUs; return why it failed, or nothing."""
    end = time.monotonic() + GPU_SECONDS
    while time.monotonic() < end:
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            return "CUDA fails, as shown above" if status else ""
        time.sleep(0.01)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return f"CUDA does not answer within {GPU_SECONDS:.0f} s"


if __name__ == "__main__":
    # A library that asks whether there is CUDA would otherwise initialise it.
    os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"
    end_alone()  # the supervisor's thread may end before the supervisor
    gc.freeze()  # no collection in a worker touches, and so copies, shared pages
    gc.enable()
    with own_directory():
        ForkServer(socket.socket(fileno=int(sys.argv[1]))).serve()
    os._exit(0)  # taking torch down in order would take a sixth of importing it
