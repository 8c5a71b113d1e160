"""The store in which processes find each other, on one address only.

The stores that PyTorch opens itself listen on all addresses of the machine. A store has
no authentication: anybody who can connect can do what its users can do.
"""

import errno
import socket
import threading
import time
from datetime import timedelta

from torch._C._distributed_c10d import TCPStore


ANSWER_SECONDS = 10.0
"""Deadline for an answer of a machine that is up; a store takes milliseconds."""
PROMPT_SECONDS, LOOK_SECONDS = 5.0, 0.02
"""For so long a store that may not be served yet is looked for, so often."""
ELSEWHERE = (errno.EADDRINUSE, errno.EADDRNOTAVAIL)
"""Another process serves the store already, or the address is another machine's."""


def serve(host: str, port: int, seconds: float) -> TCPStore:
    """Serve a store at one address. Raises OSError.

    `seconds` is the deadline of every operation on the store.
    """
    family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    with socket.create_server(address[:2], family=family) as listener:
        return TCPStore(
            str(address[0]),
            listener.getsockname()[1],
            is_master=True,
            timeout=timedelta(seconds=seconds),
            wait_for_workers=False,
            master_listen_fd=listener.detach(),
        )


def connect(host: str, port: int, seconds: float) -> TCPStore:
    """Connect to a store, once one is served. Raises torch's DistNetworkError."""
    timeout = timedelta(seconds=seconds)
    # torch waits longer and longer after each refusal, at first most of a second.
    end = time.monotonic() + min(seconds, PROMPT_SECONDS)
    while not is_there(host, port) and time.monotonic() < end:
        time.sleep(LOOK_SECONDS)
    return TCPStore(host, port, timeout=timeout, wait_for_workers=False)


class NoStoreError(Exception):
    """The program that answers is not a store."""


def serve_here(host: str, port: int, seconds: float) -> TCPStore | None:
    """Serve a store if `host` is this machine and it has none; else return None.

    Raises OSError.
    """
    try:
        return serve(host, port, seconds)
    except OSError as error:
        if error.errno not in ELSEWHERE:
            raise
        return None


def is_there(host: str, port: int) -> bool:
    """Return whether the address accepts connections."""
    try:
        with socket.create_connection((host, port), ANSWER_SECONDS):
            return True
    except OSError:  # the machine may still come up
        return False


def connect_to_store(host: str, port: int, seconds: float) -> TCPStore:
    """Connect to an address that accepts connections. Raises NoStoreError."""
    stores: list[TCPStore] = []
    # In a thread: torch would wait for ever for a program that is not a store.
    thread = threading.Thread(
        target=lambda: stores.append(connect(host, port, seconds)), daemon=True
    )
    thread.start()
    thread.join(ANSWER_SECONDS)
    if not stores:
        raise NoStoreError
    return stores[0]
