"""Processes that a worker forks to work beside it."""

import os
from collections.abc import Callable, Iterable
from multiprocessing import Pipe
from multiprocessing.connection import Connection

from samestep.system.signals import end_with


def fork(
    serve: Callable[[Connection], None], unused: Iterable[int]
) -> tuple[Connection, int]:
    """Fork a process that serves a connection; return the other end and its id.

    It closes the `unused` descriptors and ends with this process. To be called while
    this process has one thread and has loaded nothing that two cannot share.
    """
    ours, theirs = Pipe()
    parent = os.getpid()
    pid = os.fork()
    if pid == 0:
        try:
            ours.close()
            for fd in unused:
                os.close(fd)
            end_with(parent)
            serve(theirs)
        finally:
            os._exit(0)
    theirs.close()
    return ours, pid
