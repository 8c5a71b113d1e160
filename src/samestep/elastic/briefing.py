"""How a leader briefs the other workers of its machine, over a Unix socket.

The briefing has file descriptors and environment variables, so it does not go through
the store, which does not authenticate its clients. The socket has no file, only a name
in the network namespace of the machine; each end checks that the other is a process of
the same user.
"""

import os
import socket
import struct
from collections.abc import Callable

from samestep.errors import PeerLost
from samestep.messages import wire
from samestep.messages.job import Briefing


LOOK_SECONDS = 0.1
"""Seconds to wait for a connection before `pause` is called."""
ANSWER_SECONDS = 60.0
MOST_DESCRIPTORS = 16
LENGTH = struct.Struct("<q")
CREDENTIALS = struct.Struct("iII")
"""Process, user and group, as Linux's SO_PEERCRED gives them."""


def give(
    name: str,
    message: Briefing,
    descriptors: list[int],
    receivers: int,
    pause: Callable[[], None],
) -> None:
    """Send a message and descriptors to `receivers` workers of this machine.

    `pause` is called while none connects; it may raise, which ends the wait.
    """
    content = wire.encode(message)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(_address(name))
        listener.listen(receivers + 1)
        listener.settimeout(LOOK_SECONDS)
        while receivers:
            try:
                connection, _ = listener.accept()
            except TimeoutError:
                pause()
                continue
            with connection:
                if _is_of_same_user(connection):
                    length = LENGTH.pack(len(content))
                    socket.send_fds(connection, [length], descriptors)
                    connection.sendall(content)
                    receivers -= 1


def take(name: str, pause: Callable[[], None]) -> tuple[Briefing, dict[str, int]]:
    """Return the leader's message and descriptors, as soon as it sends them.

    Raises PeerLost.
    """
    while True:
        with socket.socket(socket.AF_UNIX) as connection:
            try:
                connection.connect(_address(name))
            except ConnectionError:
                pause()
                continue
            if not _is_of_same_user(connection):
                raise PeerLost(
                    "A program of another user answers instead of the leader."
                )
            connection.settimeout(ANSWER_SECONDS)
            return _received(connection)


def _received(connection: socket.socket) -> tuple[Briefing, dict[str, int]]:
    head, fds, *_ = socket.recv_fds(connection, LENGTH.size, MOST_DESCRIPTORS)
    with connection.makefile("rb") as stream:
        if len(head) < LENGTH.size:
            raise PeerLost("The leader of this machine has ended.")
        (length,) = LENGTH.unpack(head)
        content = stream.read(length)
    if len(content) < length:
        raise PeerLost("The leader of this machine has ended.")
    for fd in fds:
        os.set_inheritable(fd, False)
    message: Briefing = wire.decode(content, Briefing)
    return message, dict(zip(message.names, fds, strict=True))


def _address(name: str) -> str:
    return f"\0samestep/{name}"


def _is_of_same_user(connection: socket.socket) -> bool:
    size = CREDENTIALS.size
    raw = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, size)
    _, user, _ = CREDENTIALS.unpack(raw)
    return bool(user == os.getuid())
