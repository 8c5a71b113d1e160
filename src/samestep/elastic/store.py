"""The store in which processes find each other, on one address only.

Wherever PyTorch opens one itself, it listens on all addresses of the machine. It has no
authentication, so who reaches it can do what the processes that use it can do.
"""

import errno
import socket
from datetime import timedelta

from torch._C._distributed_c10d import TCPStore


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


def serve_or_connect(host: str, port: int, seconds: float) -> TCPStore:
    """Serves it if this is the place and nobody does yet."""
    try:
        return serve(host, port, seconds)
    except OSError as error:
        if error.errno not in ELSEWHERE:
            raise
        return connect(host, port, seconds)
