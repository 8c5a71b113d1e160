"""The store in which processes find each other, on one address only.

Wherever PyTorch opens one itself, it listens on all addresses of the machine. It has no
authentication, so who reaches it can do what the processes that use it can do.
"""

import errno
import socket
import threading
from datetime import timedelta

from torch._C._distributed_c10d import TCPStore


ANSWER_SECONDS = 10.0
"""Deadline for a machine that is there to answer: a store does so in milliseconds."""
ELSEWHERE = (errno.EADDRINUSE, errno.EADDRNOTAVAIL)
"""Another process serves it already, or another machine."""


def serve(host: str, port: int, seconds: float) -> TCPStore:
    """Listens where the others look for it. Raises OSError.

    `seconds` is the deadline for an answer, here and below.
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
    """As soon as somebody serves it. Raises torch's DistNetworkError."""
    timeout = timedelta(seconds=seconds)
    return TCPStore(host, port, timeout=timeout, wait_for_workers=False)


class NoStoreError(Exception):
    """Something answers there that is not a store."""


def serve_here(host: str, port: int, seconds: float) -> TCPStore | None:
    """None: this is not the place, or somebody here does already. Raises OSError."""
    try:
        return serve(host, port, seconds)
    except OSError as error:
        if error.errno not in ELSEWHERE:
            raise
        return None


def is_there(host: str, port: int) -> bool:
    """Whether somebody listens at an address that exists."""
    try:
        with socket.create_connection((host, port), ANSWER_SECONDS):
            return True
    except OSError:  # the machine may still come up
        return False


def connect_to_store(host: str, port: int, seconds: float) -> TCPStore:
    """To somebody who listens. Raises NoStoreError."""
    found: list[TCPStore] = []
    # A thread, since torch waits for ever for the greeting of what is not a store.
    thread = threading.Thread(
        target=lambda: found.append(connect(host, port, seconds)), daemon=True
    )
    thread.start()
    thread.join(ANSWER_SECONDS)
    if not found:
        raise NoStoreError
    return found[0]
