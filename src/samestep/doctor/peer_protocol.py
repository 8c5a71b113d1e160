"""What two doctors say to each other: JSON and counted bytes over one TCP connection.

A message is four bytes of length and that much JSON. Whatever is sent, waited for or
counted has a limit, since the other side may be anybody: nothing is executed and
nothing unpickled.
"""

import errno
import json
import os
import socket
import struct
import time
from typing import Any


MOST_MESSAGE_BYTES = 64 << 10
LEAST_BULK_BYTES, MOST_BULK_BYTES = 4 << 10, 1 << 30
IDLE_SECONDS = 5.0
"""Without a byte, after which the other side counts as gone."""
SESSION_SECONDS = 60.0
CONNECT_SECONDS = 3.0
CHUNK = 256 << 10
WARM_UP, PIECES = 4, 16
"""Of a transfer, a quarter is not timed: windows open, buckets are full."""

Message = dict[str, Any]


class Broken(Exception):
    """The other side did not keep to the limits, or to the language."""


class Wire:
    """One connection."""

    def __init__(self, connection: socket.socket) -> None:
        """The time of the session begins."""
        self.connection = connection
        self._end = time.monotonic() + SESSION_SECONDS
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    @property
    def own_address(self) -> str:
        """Of this side, as this side sees it."""
        return str(self.connection.getsockname()[0])

    @property
    def peer_address(self) -> str:
        """Of the other side, as this side sees it."""
        return str(self.connection.getpeername()[0])

    def say(self, message: Message) -> None:
        """Raises OSError or Broken."""
        raw = json.dumps(message).encode()
        if len(raw) > MOST_MESSAGE_BYTES:
            raise Broken(f"a message of {len(raw):,} bytes is too long")
        self.send(struct.pack("!I", len(raw)) + raw)

    def hear(self) -> Message:
        """Raises OSError or Broken."""
        (size,) = struct.unpack("!I", self.receive(4))
        if size > MOST_MESSAGE_BYTES:
            raise Broken(f"a message of {size:,} bytes is too long")
        try:
            message = json.loads(self.receive(size))
        except (ValueError, RecursionError):
            raise Broken("a message is not JSON") from None
        if not isinstance(message, dict):
            raise Broken("a message is not an object")
        return message

    def ask(self, what: str, **details: Any) -> Message:
        """Raises OSError or Broken."""
        self.say({"ask": what, **details})
        return self.hear()

    def send(self, raw: bytes) -> None:
        """All of it. Raises OSError or Broken."""
        self._wait_at_most()
        self.connection.sendall(raw)

    def receive(self, size: int) -> bytes:
        """Exactly `size` bytes. Raises OSError or Broken."""
        parts = bytearray()
        while len(parts) < size:
            self._wait_at_most()
            part = self.connection.recv(size - len(parts))
            if not part:
                raise Broken("the connection has ended")
            parts += part
        return bytes(parts)

    def send_bulk(self, size: int) -> None:
        """So many random bytes, which nothing on the way can compress."""
        chunk = memoryview(os.urandom(CHUNK))
        for start in range(0, size, CHUNK):
            self._wait_at_most()
            self.connection.sendall(chunk[: size - start])

    def receive_bulk(self, size: int) -> tuple[float, float]:
        """(bytes per second after the warm-up, seconds in all) of so many bytes."""
        buffer, received, warm = bytearray(4 * CHUNK), 0, (0, 0.0)
        most = min(len(buffer), size // PIECES)
        begin = time.monotonic()
        while received < size:
            self._wait_at_most()
            count = self.connection.recv_into(buffer, min(most, size - received))
            if not count:
                raise Broken("the connection has ended")
            received += count
            if not warm[0] and received >= size // WARM_UP:
                warm = received, time.monotonic()
        end = time.monotonic()
        rate = (received - warm[0]) / max(end - warm[1], 1e-9)
        return rate, end - begin

    def _wait_at_most(self) -> None:
        left = self._end - time.monotonic()
        if left <= 0:
            raise Broken(f"a session may take {SESSION_SECONDS:g} s")
        self.connection.settimeout(min(IDLE_SECONDS, left))


def try_to_connect(address: str, port: int, source: str = "") -> str:
    """`reached`, or what came instead, as `outcome_of` says."""
    try:
        connect(address, port, source).close()
    except OSError as error:
        return outcome_of(error)
    return "reached"


def connect(address: str, port: int, source: str = "") -> socket.socket:
    """From the address `source`, if one is given. Raises OSError."""
    own = (source, 0) if source else None
    return socket.create_connection((address, port), CONNECT_SECONDS, own)


def outcome_of(error: OSError) -> str:
    """The symptom: a firewall that drops says nothing, one that rejects says no."""
    if isinstance(error, TimeoutError):
        return "timeout"
    if isinstance(error, ConnectionRefusedError):
        return "refused"
    if isinstance(error, socket.gaierror):
        return "unknown name"
    if error.errno in (errno.EHOSTUNREACH, errno.ENETUNREACH, errno.EACCES):
        return "unreachable"
    return error.strerror or str(error)


def listen(address: str, port: int = 0) -> socket.socket:
    """On this address only. Raises OSError."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    return socket.create_server((address, port), family=family, backlog=4)


def number(message: Message, name: str, least: int, most: int) -> int:
    """A field of a message. Raises Broken."""
    value = message.get(name)
    if type(value) is not int or not least <= value <= most:
        raise Broken(f"`{name}` must be a number from {least} to {most}")
    return value


def real(message: Message, name: str) -> float:
    """A field of a message that is a positive time or rate. Raises Broken."""
    value = message.get(name)
    if not isinstance(value, int | float) or not 0 < value < float("inf"):
        raise Broken(f"`{name}` must be a positive number")
    return float(value)
