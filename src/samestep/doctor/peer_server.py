"""`samestep doctor --serve`: answers the doctor of another machine, for a time.

It is unauthenticated, and shows this machine's facts to whoever asks. It connects to
nobody but who has asked, runs nothing, and writes nothing.
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
    Broken,
    Message,
    Wire,
    listen,
    number,
    try_to_connect,
)


MOST_ECHOES = 1000


def serve(
    listener: socket.socket,
    seconds: float,
    observe: Callable[[], HostObservation],
    tell: Callable[[str], None],
) -> None:
    """One session after another, until the time is over."""
    end = time.monotonic() + seconds
    while (left := end - time.monotonic()) > 0:
        listener.settimeout(left)
        try:
            connection, (address, *_) = listener.accept()
        except TimeoutError:
            return
        with connection:
            tell(f"{address} asks")
            try:
                Session(Wire(connection), observe).run()
            except (OSError, Broken) as error:
                tell(f"{address}: {error}")


class Session:
    """The answers to one doctor, until it leaves."""

    def __init__(self, wire: Wire, observe: Callable[[], HostObservation]) -> None:
        """Facts are observed when they are asked for."""
        self._wire = wire
        self._observe = observe

    def run(self) -> None:
        """Raises OSError or Broken."""
        answers: Mapping[str, Callable[[Message], None]] = {
            "echo": self._echo,
            "facts": self._facts,
            "take": self._take,
            "give": self._give,
            "listen": self._listen,
            "connect": self._connect,
        }
        while (message := self._wire.hear()).get("ask") != "end":
            answer = answers.get(str(message.get("ask")))
            if answer is None:
                raise Broken("an unknown question")
            answer(message)

    def _echo(self, message: Message) -> None:
        """This machine's wall clock, as often as eight bytes come."""
        for _ in range(number(message, "times", 1, MOST_ECHOES)):
            self._wire.receive(8)
            self._wire.send(struct.pack("!d", time.time()))

    def _facts(self, message: Message) -> None:
        seen = {"facts": self._observe().model_dump(), "seen": self._wire.peer_address}
        self._wire.say(seen)

    def _take(self, message: Message) -> None:
        size = number(message, "bytes", LEAST_BULK_BYTES, MOST_BULK_BYTES)
        rate, seconds = self._wire.receive_bulk(size)
        self._wire.say({"bytes_per_second": rate, "seconds": seconds})

    def _give(self, message: Message) -> None:
        self._wire.send_bulk(
            number(message, "bytes", LEAST_BULK_BYTES, MOST_BULK_BYTES)
        )

    def _listen(self, message: Message) -> None:
        """On a port of the system's choice, as Gloo does; who comes is not heard."""
        with listen(self._wire.own_address) as listener:
            listener.settimeout(CONNECT_SECONDS)
            self._wire.say({"port": listener.getsockname()[1]})
            with contextlib.suppress(TimeoutError):
                listener.accept()[0].close()
        self._wire.say({})

    def _connect(self, message: Message) -> None:
        """Back to who asks, and to nobody else."""
        where = self._wire.peer_address, number(message, "port", 1024, 65535)
        outcome = try_to_connect(*where, source=self._wire.own_address)
        self._wire.say({"outcome": outcome})
