"""How a leader briefs the other workers of its machine, over a Unix socket.

The briefing has file descriptors and environment variables, so it does not go through
the store, which does not authenticate its clients. The socket has no file, only a name
in the network namespace of the machine; each end checks that the other is a process of
the same user.
"""

import os
import socket
import struct

from samestep.elastic.gathering import Meeting
from samestep.errors import PeerLost
from samestep.messages import wire
from samestep.messages.job import Briefing


LOOK_SECONDS = 0.1
"""Seconds to wait for a connection before `pause` is called."""
ANSWER_SECONDS = 60.0
MOST_DESCRIPTORS = 16
CREDENTIALS = struct.Struct("iII")
"""Process, user and group, as Linux's SO_PEERCRED gives them."""


def give(meeting: Meeting, message: Briefing, descriptors: list[int]) -> None:
    """Leader: send a message and descriptors to the other workers of this machine.

    `meeting.pause` is called while none connects; it may raise, which ends the wait.
    """
    line, receivers = wire.encode(message), meeting.topology.local_workers - 1
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(f"\0samestep/{meeting.socket}")
        listener.listen(receivers + 1)
        listener.settimeout(LOOK_SECONDS)
        while receivers:
            try:
                connection, _ = listener.accept()
            except TimeoutError:
                meeting.pause()
                continue
            with connection:
                if _is_of_same_user(connection):
                    socket.send_fds(connection, [line[:1]], descriptors)
                    connection.sendall(line[1:])
                    receivers -= 1


def take(meeting: Meeting) -> tuple[Briefing, dict[str, int]]:
    """Return the leader's message and descriptors, as soon as it sends them.

    Raises PeerLost.
    """
    while True:
        with socket.socket(socket.AF_UNIX) as connection:
            try:
                connection.connect(f"\0samestep/{meeting.socket}")
            except ConnectionError:
                meeting.pause()
                continue
            if not _is_of_same_user(connection):
                raise PeerLost(
                    "A program of another user answers instead of the leader."
                )
            connection.settimeout(ANSWER_SECONDS)
            return _received(connection)


def _received(connection: socket.socket) -> tuple[Briefing, dict[str, int]]:
    head, fds, *_ = socket.recv_fds(connection, 1, MOST_DESCRIPTORS)
    with connection.makefile("rb") as stream:
        line = head + stream.read()
    if not line.endswith(b"\n"):
        raise PeerLost("The leader of this machine has ended.")
    for fd in fds:
        os.set_inheritable(fd, False)
    message: Briefing = wire.decode(line, Briefing)
    return message, dict(zip(message.names, fds, strict=True))


def _is_of_same_user(connection: socket.socket) -> bool:
    size = CREDENTIALS.size
    raw = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, size)
    _, user, _ = CREDENTIALS.unpack(raw)
    return bool(user == os.getuid())
