"""Processes and ports of a test, whatever else runs on this machine."""

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil


MARK = "SAMESTEP_TEST_OWNER"
"""Every process inherits it from the program that a test starts with `marked`."""


def marked(owner: Path) -> dict[str, str]:
    """Return this environment with a mark by which `started_by` finds processes."""
    return {**os.environ, MARK: str(owner)}


def started_by(owner: Path) -> Iterator[psutil.Process]:
    """Yield the running processes that were started with `marked(owner)`."""
    for process in psutil.process_iter():
        try:
            if process.environ().get(MARK) == str(owner):
                yield process
        except psutil.Error:
            continue


def is_running(pid: int) -> bool:
    """Return whether a process has not ended; perhaps nobody has waited for it."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@contextmanager
def reserved_port() -> Iterator[int]:
    """Yield a port of the loopback interface for a server in another process.

    The kernel assigns a bound port to no other program. A server that sets
    SO_REUSEADDR can still bind it, since nothing listens here.
    """
    with socket.socket() as held:
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        held.bind(("127.0.0.1", 0))
        yield held.getsockname()[1]
