"""The operating-system resources that the workers of one machine share."""

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager

from samestep.system import barrier
from samestep.system.heartbeat import Heartbeat


@contextmanager
def resources(exchange: str, workers: int) -> Iterator[tuple[dict[str, int], int]]:
    """Yield descriptors for the workers, and the port of the store if there is one.

    `heartbeat` is the memory of all heartbeats, `memory` that of a `shared` exchange,
    and `store` a listening socket for rank 0.
    """
    fds = {"heartbeat": Heartbeat.create(workers)}
    try:
        if exchange == "shared":
            fds["memory"] = barrier.create(workers)
            yield fds, 0
        else:
            with socket.create_server(("127.0.0.1", 0)) as store:
                yield {**fds, "store": store.fileno()}, store.getsockname()[1]
    finally:
        for fd in fds.values():
            os.close(fd)
