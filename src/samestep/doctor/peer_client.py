"""Asks the doctor of another machine, and measures the way there and back."""

import contextlib
import math
import statistics
import struct
import time
from collections.abc import Callable, Mapping
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from samestep.doctor.observe import HostObservation, Text
from samestep.doctor.peer_protocol import (
    MOST_BULK_BYTES,
    Broken,
    Wire,
    connect,
    listen,
    number,
    outcome_of,
    real,
    try_to_connect,
)
from samestep.doctor.peer_server import MOST_ECHOES


FIRST_BULK_BYTES = 64 << 10
BULK_SECONDS = 0.25
"""A transfer this long has left a bucket's burst and TCP's slow start behind."""
WARM_UP_ECHOES, ECHO_SECONDS = 5, 1.0

Rate = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class Link(BaseModel):
    """What is between this machine and its peer; None: not found out."""

    model_config = ConfigDict(frozen=True)

    peer: str
    port: int
    outcome: Text
    """Of the first connection: `reached`, or as `wire.outcome_of` says."""
    own_address: Text = ""
    seen_address: Text = ""
    """This machine's, as the peer sees it."""
    peer_address: Text = ""
    latency_seconds: float | None = None
    """One way: half of the median round trip."""
    round_trips: int = 0
    clock_offset_seconds: float | None = None
    """The peer's wall clock minus this one's, from the fastest round trip."""
    clock_error_seconds: float = 0.0
    """At most: half of that round trip."""
    to_peer_bytes_per_second: Rate | None = None
    from_peer_bytes_per_second: Rate | None = None
    to_peer_port: Text = ""
    """The outcome on a port of the system's choice, as Gloo's workers use."""
    from_peer_port: Text = ""
    facts: HostObservation | None = None
    broke: Text = ""
    """In which part the conversation ended, and how; empty: it did not."""


def probe(peer: str, port: int, source: str = "") -> Link:
    """Takes about five seconds. `source` is the own address to use; empty: any."""
    found: dict[str, Any] = {"peer": peer, "port": port, "outcome": "reached"}
    try:
        connection = connect(peer, port, source)
    except OSError as error:
        return Link(**{**found, "outcome": outcome_of(error)})
    with connection:
        wire = Wire(connection)
        found |= {"own_address": wire.own_address, "peer_address": wire.peer_address}
        for part, measure in MEASURES.items():
            try:
                found |= measure(wire)
            except OSError as error:
                return Link(**found, broke=f"{part}: {outcome_of(error)}")
            except (Broken, ValidationError) as error:
                return Link(**found, broke=f"{part}: {str(error).splitlines()[0]}")
        with contextlib.suppress(OSError):
            wire.say({"ask": "end"})
    return Link(**found)


def _echo(wire: Wire) -> dict[str, Any]:
    """As NTP does (RFC 5905, section 8): the fastest round trip is the least wrong."""
    warm_up = _round_trips(wire, WARM_UP_ECHOES)
    typical = statistics.median(seconds for seconds, _ in warm_up)
    times = max(WARM_UP_ECHOES, min(MOST_ECHOES, int(ECHO_SECONDS / typical)))
    trips = _round_trips(wire, times)
    fastest, offset = min(trips)
    return {
        "latency_seconds": statistics.median(seconds for seconds, _ in trips) / 2,
        "round_trips": times,
        "clock_offset_seconds": offset,
        "clock_error_seconds": fastest / 2,
    }


def _round_trips(wire: Wire, times: int) -> list[tuple[float, float]]:
    """(seconds, offset of the peer's clock) of each."""
    wire.say({"ask": "echo", "times": times})
    trips = []
    for _ in range(times):
        wall, begin = time.time(), time.perf_counter()
        wire.send(bytes(8))
        (theirs,) = struct.unpack("!d", wire.receive(8))
        seconds = time.perf_counter() - begin
        if not math.isfinite(theirs):
            raise Broken("a time that is no number")
        trips.append((seconds, theirs - wall - seconds / 2))
    return trips


def _facts(wire: Wire) -> dict[str, Any]:
    answer = wire.ask("facts")
    seen = str(answer.get("seen"))[:100]
    return {
        "facts": HostObservation.model_validate(answer.get("facts")),
        "seen_address": seen,
    }


def _to_peer(wire: Wire) -> dict[str, Any]:
    def give(size: int) -> tuple[float, float]:
        wire.say({"ask": "take", "bytes": size})
        wire.send_bulk(size)
        answer = wire.hear()
        return real(answer, "bytes_per_second"), real(answer, "seconds")

    return {"to_peer_bytes_per_second": _bandwidth(give)}


def _from_peer(wire: Wire) -> dict[str, Any]:
    def take(size: int) -> tuple[float, float]:
        wire.say({"ask": "give", "bytes": size})
        return wire.receive_bulk(size)

    return {"from_peer_bytes_per_second": _bandwidth(take)}


def _bandwidth(transfer: Callable[[int], tuple[float, float]]) -> float:
    """Larger and larger transfers, until one is long enough."""
    size = FIRST_BULK_BYTES
    while True:
        rate, seconds = transfer(size)
        if seconds >= BULK_SECONDS or 4 * size > MOST_BULK_BYTES:
            return rate
        size *= 4


def _to_peer_port(wire: Wire) -> dict[str, Any]:
    port = number(wire.ask("listen"), "port", 1, 65535)
    outcome = try_to_connect(wire.peer_address, port, wire.own_address)
    wire.hear()
    return {"to_peer_port": outcome}


def _from_peer_port(wire: Wire) -> dict[str, Any]:
    with listen(wire.own_address) as listener:
        answer = wire.ask("connect", port=listener.getsockname()[1])
    return {"from_peer_port": str(answer.get("outcome"))[:100]}


MEASURES: Mapping[str, Callable[[Wire], dict[str, Any]]] = {
    "round trips": _echo,
    "facts": _facts,
    "bandwidth there": _to_peer,
    "bandwidth back": _from_peer,
    "a port there": _to_peer_port,
    "a port back": _from_peer_port,
}
