"""Two doctors: one answers over a TCP connection, the other measures it both ways.

A message is four bytes of length and that much JSON. The other side can be anyone, so
every field, wait and count has a limit; nothing is executed and nothing unpickled. The
doctor that serves is unauthenticated: anyone who reaches it sees what `observe` saw of
this machine. It connects only back to the machine that asks.
"""

import contextlib
import errno
import os
import socket
import statistics
import struct
import time
from collections.abc import Callable, Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from samestep.doctor.observe import MOST, HostObservation, Text


MOST_MESSAGE_BYTES = 64 << 10
IDLE_SECONDS = 5.0
"""Seconds without a byte, after which the other side counts as gone."""
SESSION_SECONDS = 60.0
CONNECT_SECONDS = 3.0
WARM_UP_ECHOES, MOST_ECHOES, ECHO_SECONDS = 5, 1000, 1.0
FIRST_BULK_BYTES, MOST_BULK_BYTES = 64 << 10, 1 << 30
BULK_SECONDS = 0.25
"""A transfer this long outlasts a bucket's burst and TCP's slow start."""
CHUNK = 256 << 10
WARM_UP = 4
"""A quarter of a transfer is not timed: TCP's window opens, bursts are over."""

Rate = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class Message(BaseModel):
    """A question or an answer; each has some of the fields."""

    model_config = ConfigDict(extra="forbid", strict=True)

    ask: Literal["", "echo", "facts", "take", "give", "listen", "connect", "end"] = ""
    times: Annotated[int, Field(ge=1, le=MOST_ECHOES)] = 1
    size: Annotated[int, Field(ge=4 << 10, le=MOST_BULK_BYTES)] = FIRST_BULK_BYTES
    port: Annotated[int, Field(ge=1024, le=65535)] = 1024
    outcome: Text = ""
    facts: HostObservation | None = None
    seen_address: Text = ""
    bulk: tuple[Rate, Rate] = (0.0, 0.0)
    """What `Session.receive_bulk` returned."""


class Link(BaseModel):
    """The connection between this machine and its peer; None: not measured."""

    model_config = ConfigDict(validate_assignment=True)

    peer: str
    port: int
    outcome: Text = "reached"
    """The first connection: `reached`, or as `outcome_of` names it."""
    own_address: Text = ""
    seen_address: Text = ""
    """This machine's address, as the peer sees it."""
    peer_address: Text = ""
    latency_seconds: float | None = None
    """One way: half of the median round trip."""
    round_trips: int = 0
    clock_offset_seconds: float | None = None
    """The peer's wall clock minus this one's, from the fastest round trip."""
    clock_error_seconds: float = 0.0
    """Its largest error: half of that round trip."""
    to_peer_bytes_per_second: Rate | None = None
    from_peer_bytes_per_second: Rate | None = None
    to_peer_port: Text = ""
    """The outcome on a port that the system chooses, as for Gloo's workers."""
    from_peer_port: Text = ""
    facts: HostObservation | None = None
    broke: Text = ""
    """In which part the session ended early, and how; empty: it did not."""


class Session:
    """One connection; its methods raise OSError, or ValueError for a broken limit."""

    def __init__(self, connection: socket.socket) -> None:
        """Start the session's time."""
        self._socket = connection
        self._end = time.monotonic() + SESSION_SECONDS
        self.own_address = str(connection.getsockname()[0])
        self.peer_address = str(connection.getpeername()[0])
        # Nagle's algorithm would delay small messages, and so the measured round trips.
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def send(self, **fields: Any) -> None:
        """Send a message."""
        raw = Message(**fields).model_dump_json(exclude_defaults=True).encode()
        self.write(struct.pack("!I", len(raw)) + raw)

    def receive(self) -> Message:
        """Receive a message."""
        (size,) = struct.unpack("!I", self.read(4))
        if size > MOST_MESSAGE_BYTES:
            raise ValueError(f"a message of {size:,} bytes is too long")
        try:
            return Message.model_validate_json(self.read(size))
        except ValidationError as error:
            why = error.errors()[0]["msg"]
            raise ValueError(f"a message is not a doctor's: {why}") from None

    def request(self, **question: Any) -> Message:
        """Send a question and receive the answer."""
        self.send(**question)
        return self.receive()

    def write(self, raw: bytes | memoryview) -> None:
        """Send all bytes."""
        self._set_timeout()
        self._socket.sendall(raw)

    def read(self, size: int) -> bytearray:
        """Receive exactly `size` bytes."""
        content = bytearray(size)
        self._fill(memoryview(content))
        return content

    def _fill(self, buffer: memoryview) -> None:
        while buffer:
            self._set_timeout()
            count = self._socket.recv_into(buffer)
            if not count:
                raise ValueError("the connection has ended")
            buffer = buffer[count:]

    def send_bulk(self, size: int) -> None:
        """Send `size` random bytes, which no device on the way can compress."""
        chunk = memoryview(os.urandom(CHUNK))
        for start in range(0, size, CHUNK):
            self.write(chunk[: size - start])

    def receive_bulk(self, size: int) -> tuple[float, float]:
        """Receive `size` bytes; return (bytes per second after a warm-up, seconds)."""
        timed = size - size // WARM_UP
        begin = time.monotonic()
        self._skip(size // WARM_UP)
        warm = time.monotonic()
        self._skip(timed)
        end = time.monotonic()
        return timed / max(end - warm, 1e-9), end - begin

    def _skip(self, size: int) -> None:
        buffer = memoryview(bytearray(CHUNK))
        for start in range(0, size, CHUNK):
            self._fill(buffer[: size - start])

    def _set_timeout(self) -> None:
        left = self._end - time.monotonic()
        if left <= 0:
            raise ValueError(f"a session may take {SESSION_SECONDS:g} s")
        self._socket.settimeout(min(IDLE_SECONDS, left))


def try_to_connect(address: str, port: int, source: str) -> str:
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


def outcome_of(error: Exception) -> str:
    """Name the symptom: a firewall that drops is silent, one that rejects answers."""
    if isinstance(error, TimeoutError):
        return "timeout"
    if isinstance(error, ConnectionRefusedError):
        return "refused"
    if isinstance(error, socket.gaierror):
        return "unknown name"
    unreachable = errno.EHOSTUNREACH, errno.ENETUNREACH, errno.EACCES
    if isinstance(error, OSError) and error.errno in unreachable:
        return "unreachable"
    return getattr(error, "strerror", None) or str(error)


def listen(address: str, port: int = 0) -> socket.socket:
    """Listen on this address only. Raises OSError."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    return socket.create_server((address, port), family=family, backlog=4)


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
                _answer(Session(connection), observe)
            except (OSError, ValueError) as error:
                log(f"{address}: {error}")


def _answer(session: Session, observe: Callable[[], HostObservation]) -> None:
    """Answer questions until the last."""
    while (question := session.receive()).ask != "end":
        match question.ask:
            case "echo":
                for _ in range(question.times):
                    session.read(8)
                    session.write(struct.pack("!q", time.time_ns()))
            case "facts":
                session.send(facts=observe(), seen_address=session.peer_address)
            case "take":
                session.send(bulk=session.receive_bulk(question.size))
            case "give":
                session.send_bulk(question.size)
            case "listen":
                _accept_one(session)
            case "connect":
                where = session.peer_address, question.port, session.own_address
                session.send(outcome=try_to_connect(*where))
            case _:
                raise ValueError("a message is not a question")


def _accept_one(session: Session) -> None:
    """Accept one connection on a port that the system chooses, as Gloo does."""
    with listen(session.own_address) as listener:
        listener.settimeout(CONNECT_SECONDS)
        session.send(port=listener.getsockname()[1])
        with contextlib.suppress(TimeoutError):
            listener.accept()[0].close()
    session.send()


def probe(peer: str, port: int, source: str = "") -> Link:
    """Measure the link to a peer, from the address `source` if one is given.

    Takes about five seconds.
    """
    link = Link(peer=peer, port=port)
    try:
        connected = connect(peer, port, source)
    except OSError as error:
        link.outcome = outcome_of(error)
        return link
    with connected:
        session = Session(connected)
        link.own_address, link.peer_address = session.own_address, session.peer_address
        for part, measure in MEASURES.items():
            try:
                measure(session, link)
            except (OSError, ValueError) as error:
                link.broke = f"{part}: {outcome_of(error)}"[:MOST]
                return link
        with contextlib.suppress(OSError):
            session.send(ask="end")
    return link


def _echo(session: Session, link: Link) -> None:
    # As NTP does (RFC 5905, section 8): the fastest round trip has the least error.
    warm_up = _round_trips(session, WARM_UP_ECHOES)
    typical = statistics.median(seconds for seconds, _ in warm_up)
    times = max(WARM_UP_ECHOES, min(MOST_ECHOES, int(ECHO_SECONDS / typical)))
    trips = _round_trips(session, times)
    fastest, link.clock_offset_seconds = min(trips)
    link.clock_error_seconds = fastest / 2
    link.latency_seconds = statistics.median(seconds for seconds, _ in trips) / 2
    link.round_trips = times


def _round_trips(session: Session, times: int) -> list[tuple[float, float]]:
    """Return (seconds, offset of the peer's clock) of each round trip."""
    session.send(ask="echo", times=times)
    trips = []
    for _ in range(times):
        wall, begin = time.time_ns(), time.perf_counter()
        session.write(bytes(8))
        (theirs,) = struct.unpack("!q", session.read(8))
        seconds = time.perf_counter() - begin
        trips.append((seconds, (theirs - wall) / 1e9 - seconds / 2))
    return trips


def _facts(session: Session, link: Link) -> None:
    answer = session.request(ask="facts")
    link.facts, link.seen_address = answer.facts, answer.seen_address


def _to_peer(session: Session, link: Link) -> None:
    def give(size: int) -> tuple[float, float]:
        session.send(ask="take", size=size)
        session.send_bulk(size)
        return session.receive().bulk

    link.to_peer_bytes_per_second = _bandwidth(give)


def _from_peer(session: Session, link: Link) -> None:
    def take(size: int) -> tuple[float, float]:
        session.send(ask="give", size=size)
        return session.receive_bulk(size)

    link.from_peer_bytes_per_second = _bandwidth(take)


def _bandwidth(transfer: Callable[[int], tuple[float, float]]) -> float:
    """Transfer more and more, until it takes long enough; return bytes per second."""
    size = FIRST_BULK_BYTES
    while True:
        rate, seconds = transfer(size)
        if seconds >= BULK_SECONDS or 4 * size > MOST_BULK_BYTES:
            return rate
        size *= 4


def _to_peer_port(session: Session, link: Link) -> None:
    port = session.request(ask="listen").port
    link.to_peer_port = try_to_connect(link.peer_address, port, link.own_address)
    session.receive()


def _from_peer_port(session: Session, link: Link) -> None:
    with listen(link.own_address) as listener:
        port = listener.getsockname()[1]
        link.from_peer_port = session.request(ask="connect", port=port).outcome


MEASURES: Mapping[str, Callable[[Session, Link], None]] = {
    "round trips": _echo,
    "facts": _facts,
    "bandwidth there": _to_peer,
    "bandwidth back": _from_peer,
    "a port there": _to_peer_port,
    "a port back": _from_peer_port,
}
