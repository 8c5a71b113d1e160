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
                Session(Connection(connection), observe).run()
            except (OSError, ProtocolError) as error:
                log(f"{address}: {error}")


class Session:
    """The answers to one doctor, until it leaves."""

    def __init__(
        self, connection: Connection, observe: Callable[[], HostObservation]
    ) -> None:
        """Observe this machine only when asked."""
        self._connection = connection
        self._observe = observe

    def run(self) -> None:
        """Answer questions until the last. Raises OSError or ProtocolError."""
        answers: Mapping[str, Callable[[Message], None]] = {
            "echo": self._echo,
            "facts": self._facts,
            "take": self._take,
            "give": self._give,
            "listen": self._listen,
            "connect": self._connect,
        }
        while (message := self._connection.receive_message()).get("ask") != "end":
            answer = answers.get(str(message.get("ask")))
            if answer is None:
                raise ProtocolError("an unknown question")
            answer(message)

    def _echo(self, message: Message) -> None:
        """Send this machine's wall clock whenever eight bytes arrive."""
        for _ in range(integer(message, "times", 1, MOST_ECHOES)):
            self._connection.receive(8)
            self._connection.send(struct.pack("!d", time.time()))

    def _facts(self, _: Message) -> None:
        facts = self._observe().model_dump()
        seen = self._connection.peer_address
        self._connection.send_message({"facts": facts, "seen": seen})

    def _take(self, message: Message) -> None:
        rate, seconds = self._connection.receive_bulk(_bulk_size(message))
        answer = {"bytes_per_second": rate, "seconds": seconds}
        self._connection.send_message(answer)

    def _give(self, message: Message) -> None:
        self._connection.send_bulk(_bulk_size(message))

    def _listen(self, _: Message) -> None:
        """Accept one connection on a port that the system chooses, as Gloo does."""
        with listen(self._connection.own_address) as listener:
            listener.settimeout(CONNECT_SECONDS)
            self._connection.send_message({"port": listener.getsockname()[1]})
            with contextlib.suppress(TimeoutError):
                listener.accept()[0].close()
        self._connection.send_message({})

    def _connect(self, message: Message) -> None:
        """Connect back to the machine that asks, and to no other."""
        port = integer(message, "port", 1024, 65535)
        link = self._connection
        outcome = try_to_connect(link.peer_address, port, link.own_address)
        link.send_message({"outcome": outcome})


def _bulk_size(message: Message) -> int:
    return integer(message, "bytes", LEAST_BULK_BYTES, MOST_BULK_BYTES)
