"""The protocol of two doctors: JSON and counted bytes over one TCP connection.

A message is four bytes of length and that much JSON. The other side can be anyone, so
every message, wait and count has a limit; nothing is executed and nothing unpickled.
"""

import errno
import json
import os
import socket
import struct
import time
from typing import Any

from samestep.system.json_values import JsonObject


MOST_MESSAGE_BYTES = 64 << 10
LEAST_BULK_BYTES, MOST_BULK_BYTES = 4 << 10, 1 << 30
IDLE_SECONDS = 5.0
"""Seconds without a byte, after which the other side counts as gone."""
SESSION_SECONDS = 60.0
CONNECT_SECONDS = 3.0
CHUNK = 256 << 10
WARM_UP, PIECES = 4, 16
"""A quarter of a transfer is not timed: TCP's window opens, bursts are over."""

Message = JsonObject


class ProtocolError(Exception):
    """The other side broke the protocol or a limit."""


class Connection:
    """One session; its methods raise OSError, or ProtocolError."""

    def __init__(self, connection: socket.socket) -> None:
        """Start the session's time."""
        self.socket = connection
        self._end = time.monotonic() + SESSION_SECONDS
        # Nagle's algorithm would delay small messages, and so the measured round trips.
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    @property
    def own_address(self) -> str:
        """The address of this side, as this side sees it."""
        return str(self.socket.getsockname()[0])

    @property
    def peer_address(self) -> str:
        """The address of the other side, as this side sees it."""
        return str(self.socket.getpeername()[0])

    def send_message(self, message: Message) -> None:
        """Send a message."""
        raw = json.dumps(message).encode()
        if len(raw) > MOST_MESSAGE_BYTES:
            raise ProtocolError(f"a message of {len(raw):,} bytes is too long")
        self.send(struct.pack("!I", len(raw)) + raw)

    def receive_message(self) -> Message:
        """Receive a message."""
        (size,) = struct.unpack("!I", self.receive(4))
        if size > MOST_MESSAGE_BYTES:
            raise ProtocolError(f"a message of {size:,} bytes is too long")
        try:
            message = json.loads(self.receive(size))
        except (ValueError, RecursionError):
            raise ProtocolError("a message is not JSON") from None
        if not isinstance(message, dict):
            raise ProtocolError("a message is not an object")
        return message

    def request(self, question: str, **details: Any) -> Message:
        """Send a question and receive the answer."""
        self.send_message({"ask": question, **details})
        return self.receive_message()

    def send(self, raw: bytes | memoryview) -> None:
        """Send all bytes."""
        self._set_timeout()
        self.socket.sendall(raw)

    def receive(self, size: int) -> bytes:
        """Receive exactly `size` bytes."""
        buffer = bytearray(size)
        received = 0
        while received < size:
            received += self._receive_into(memoryview(buffer)[received:])
        return bytes(buffer)

    def send_bulk(self, size: int) -> None:
        """Send `size` random bytes, which no device on the way can compress."""
        chunk = memoryview(os.urandom(CHUNK))
        for start in range(0, size, CHUNK):
            self.send(chunk[: size - start])

    def receive_bulk(self, size: int) -> tuple[float, float]:
        """Receive `size` bytes; return (bytes per second after a warm-up, seconds)."""
        buffer = memoryview(bytearray(min(4 * CHUNK, size // PIECES)))
        received, warm = 0, (0, 0.0)
        begin = time.monotonic()
        while received < size:
            received += self._receive_into(buffer[: size - received])
            if not warm[0] and received >= size // WARM_UP:
                warm = received, time.monotonic()
        end = time.monotonic()
        rate = (received - warm[0]) / max(end - warm[1], 1e-9)
        return rate, end - begin

    def _receive_into(self, buffer: memoryview) -> int:
        self._set_timeout()
        count = self.socket.recv_into(buffer)
        if not count:
            raise ProtocolError("the connection has ended")
        return count

    def _set_timeout(self) -> None:
        left = self._end - time.monotonic()
        if left <= 0:
            raise ProtocolError(f"a session may take {SESSION_SECONDS:g} s")
        self.socket.settimeout(min(IDLE_SECONDS, left))


def try_to_connect(address: str, port: int, source: str = "") -> str:
    """Return `reached`, or the outcome as `outcome_of` names it."""
    try:
        connect(address, port, source).close()
    except OSError as error:
        return outcome_of(error)
    return "reached"


def connect(address: str, port: int, source: str = "") -> socket.socket:
    """Connect, from the address `source` if one is given. Raises OSError."""
    own = (source, 0) if source else None
    return socket.create_connection((address, port), CONNECT_SECONDS, own)


def outcome_of(error: OSError) -> str:
    """Name the symptom: a firewall that drops is silent, one that rejects answers."""
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
    """Listen on this address only. Raises OSError."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    return socket.create_server((address, port), family=family, backlog=4)


def integer(message: Message, name: str, least: int, most: int) -> int:
    """Return a field of a message. Raises ProtocolError."""
    value = message.get(name)
    if type(value) is not int or not least <= value <= most:
        raise ProtocolError(f"`{name}` must be a number from {least} to {most}")
    return value


def positive(message: Message, name: str) -> float:
    """Return a field of a message that is a time or a rate. Raises ProtocolError."""
    value = message.get(name)
    if not isinstance(value, int | float) or not 0 < value < float("inf"):
        raise ProtocolError(f"`{name}` must be a positive number")
    return float(value)
