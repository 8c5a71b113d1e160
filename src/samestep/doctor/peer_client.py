"""Asks the doctor of another machine, and measures the connection both ways."""

import contextlib
import math
import statistics
import struct
import time
from collections.abc import Callable, Mapping
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from samestep.doctor.observe import HostObservation, Text
from samestep.doctor.peer_protocol import (
    MOST_BULK_BYTES,
    Connection,
    ProtocolError,
    connect,
    integer,
    listen,
    outcome_of,
    positive,
    try_to_connect,
)
from samestep.doctor.peer_server import MOST_ECHOES
from samestep.system.json_values import JsonObject


FIRST_BULK_BYTES = 64 << 10
BULK_SECONDS = 0.25
"""A transfer this long outlasts a bucket's burst and TCP's slow start."""
WARM_UP_ECHOES, ECHO_SECONDS = 5, 1.0

Rate = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class Link(BaseModel):
    """The connection between this machine and its peer; None: not measured."""

    model_config = ConfigDict(frozen=True)

    peer: str
    port: int
    outcome: Text
    """The first connection: `reached`, or as `peer_protocol.outcome_of` names it."""
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


def probe(peer: str, port: int, source: str = "") -> Link:
    """Measure the link to a peer, from the address `source` if one is given.

    Takes about five seconds.
    """
    fields: JsonObject = {"peer": peer, "port": port, "outcome": "reached"}
    try:
        connected = connect(peer, port, source)
    except OSError as error:
        return Link(**{**fields, "outcome": outcome_of(error)})
    with connected:
        link = Connection(connected)
        fields |= {"own_address": link.own_address, "peer_address": link.peer_address}
        for part, measure in MEASURES.items():
            try:
                fields |= measure(link)
            except OSError as error:
                return Link(**fields, broke=f"{part}: {outcome_of(error)}")
            except (ProtocolError, ValidationError) as error:
                return Link(**fields, broke=f"{part}: {str(error).splitlines()[0]}")
        with contextlib.suppress(OSError, ProtocolError):
            link.send_message({"ask": "end"})
    return Link(**fields)


def _echo(link: Connection) -> JsonObject:
    # As NTP does (RFC 5905, section 8): the fastest round trip has the least error.
    warm_up = _round_trips(link, WARM_UP_ECHOES)
    typical = statistics.median(seconds for seconds, _ in warm_up)
    times = max(WARM_UP_ECHOES, min(MOST_ECHOES, int(ECHO_SECONDS / typical)))
    trips = _round_trips(link, times)
    fastest, offset = min(trips)
    return {
        "latency_seconds": statistics.median(seconds for seconds, _ in trips) / 2,
        "round_trips": times,
        "clock_offset_seconds": offset,
        "clock_error_seconds": fastest / 2,
    }


def _round_trips(link: Connection, times: int) -> list[tuple[float, float]]:
    """Return (seconds, offset of the peer's clock) of each round trip."""
    link.send_message({"ask": "echo", "times": times})
    trips = []
    for _ in range(times):
        wall, begin = time.time(), time.perf_counter()
        link.send(bytes(8))
        (theirs,) = struct.unpack("!d", link.receive(8))
        seconds = time.perf_counter() - begin
        if not math.isfinite(theirs):
            raise ProtocolError("a time is not a number")
        trips.append((seconds, theirs - wall - seconds / 2))
    return trips


def _facts(link: Connection) -> JsonObject:
    answer = link.request("facts")
    return {
        "facts": HostObservation.model_validate(answer.get("facts")),
        "seen_address": str(answer.get("seen"))[:100],
    }


def _to_peer(link: Connection) -> JsonObject:
    def give(size: int) -> tuple[float, float]:
        link.send_message({"ask": "take", "bytes": size})
        link.send_bulk(size)
        answer = link.receive_message()
        return positive(answer, "bytes_per_second"), positive(answer, "seconds")

    return {"to_peer_bytes_per_second": _bandwidth(give)}


def _from_peer(link: Connection) -> JsonObject:
    def take(size: int) -> tuple[float, float]:
        link.send_message({"ask": "give", "bytes": size})
        return link.receive_bulk(size)

    return {"from_peer_bytes_per_second": _bandwidth(take)}


def _bandwidth(transfer: Callable[[int], tuple[float, float]]) -> float:
    """Transfer more and more, until it takes long enough; return bytes per second."""
    size = FIRST_BULK_BYTES
    while True:
        rate, seconds = transfer(size)
        if seconds >= BULK_SECONDS or 4 * size > MOST_BULK_BYTES:
            return rate
        size *= 4


def _to_peer_port(link: Connection) -> JsonObject:
    port = integer(link.request("listen"), "port", 1, 65535)
    outcome = try_to_connect(link.peer_address, port, link.own_address)
    link.receive_message()
    return {"to_peer_port": outcome}


def _from_peer_port(link: Connection) -> JsonObject:
    with listen(link.own_address) as listener:
        answer = link.request("connect", port=listener.getsockname()[1])
    return {"from_peer_port": str(answer.get("outcome"))[:100]}


MEASURES: Mapping[str, Callable[[Connection], JsonObject]] = {
    "round trips": _echo,
    "facts": _facts,
    "bandwidth there": _to_peer,
    "bandwidth back": _from_peer,
    "a port there": _to_peer_port,
    "a port back": _from_peer_port,
}
