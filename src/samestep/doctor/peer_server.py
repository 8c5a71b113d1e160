"""`samestep doctor --serve`: answers the doctor of another machine, for a time.

It is unauthenticated: anyone who reaches it sees what `observe` saw of this machine. It
connects only back to the machine that asks, runs nothing, and writes nothing.
"""

import contextlib
import socket
import struct
import time
from collections.abc import Callable, Mapping

from samestep.doctor.observe import HostObservation
from samestep.doctor.peer_protocol import (
    CONNECT_SECONDS,
    LEAST_BULK_BYTES,
    MOST_BULK_BYTES,
    Connection,
    Message,
    ProtocolError,
    integer,
    listen,
    try_to_connect,
)


MOST_ECHOES = 1000


def serve(
    listener: socket.socket,
    seconds: float,
    observe: Callable[[], HostObservation],
    log: Callable[[str], None],
) -> None:
    """Serve one session after another, until the time is over."""
    end = time.monotonic() + seconds
    while (left := end - time.monotonic()) > 0:
        listener.settimeout(left)
        try:
            connection, (address, *_) = listener.accept()
        except TimeoutError:
            return
        with connection:
            log(f"{address} asks")
            try:
                answer(Connection(connection), observe)
            except (OSError, ProtocolError) as error:
                log(f"{address}: {error}")


def answer(link: Connection, observe: Callable[[], HostObservation]) -> None:
    """Answer questions until the last. Raises OSError or ProtocolError."""
    while (message := link.receive_message()).get("ask") != "end":
        question = message.get("ask")
        if question == "facts":
            facts = observe().model_dump()
            link.send_message({"facts": facts, "seen": link.peer_address})
        elif isinstance(question, str) and question in ANSWERS:
            ANSWERS[question](link, message)
        else:
            raise ProtocolError("an unknown question")


def _echo(link: Connection, message: Message) -> None:
    """Send this machine's wall clock whenever eight bytes arrive."""
    for _ in range(integer(message, "times", 1, MOST_ECHOES)):
        link.receive(8)
        link.send(struct.pack("!d", time.time()))


def _take(link: Connection, message: Message) -> None:
    rate, seconds = link.receive_bulk(_bulk_size(message))
    link.send_message({"bytes_per_second": rate, "seconds": seconds})


def _give(link: Connection, message: Message) -> None:
    link.send_bulk(_bulk_size(message))


def _bulk_size(message: Message) -> int:
    return integer(message, "bytes", LEAST_BULK_BYTES, MOST_BULK_BYTES)


def _listen(link: Connection, _: Message) -> None:
    """Accept one connection on a port that the system chooses, as Gloo does."""
    with listen(link.own_address) as listener:
        listener.settimeout(CONNECT_SECONDS)
        link.send_message({"port": listener.getsockname()[1]})
        with contextlib.suppress(TimeoutError):
            listener.accept()[0].close()
    link.send_message({})


def _connect(link: Connection, message: Message) -> None:
    """Connect back to the machine that asks, and to no other."""
    port = integer(message, "port", 1024, 65535)
    outcome = try_to_connect(link.peer_address, port, link.own_address)
    link.send_message({"outcome": outcome})


ANSWERS: Mapping[str, Callable[[Connection, Message], None]] = {
    "echo": _echo,
    "take": _take,
    "give": _give,
    "listen": _listen,
    "connect": _connect,
}
