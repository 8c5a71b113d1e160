"""Processes that a worker forks to work beside it."""

import os
from collections.abc import Callable, Iterable
from multiprocessing import Pipe
from multiprocessing.connection import Connection

from samestep.system.signals import end_with


def fork(
    serve: Callable[[Connection], None], unused: Iterable[int]
) -> tuple[Connection, int]:
    """Fork a process that runs `serve`; return the other end of its pipe, and its id.

    The child closes the `unused` descriptors and ends with this process. Call it before
    this process starts threads, which a fork does not copy.
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
