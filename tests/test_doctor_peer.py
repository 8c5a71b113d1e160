"""Two doctors: over real sockets on this machine, and between hosts of namespaces."""

import json
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from typing import Any

import psutil
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_cli import samestep

from samestep.doctor import wire
from samestep.doctor.facts import Facts, observe
from samestep.doctor.probing import Link, probe
from samestep.doctor.serving import serve
from samestep.doctor.wire import Wire, listen


DEADLINE = 60.0
observe_once = partial(observe, port=0)


@pytest.fixture
def said() -> list[str]:
    """What the server tells."""
    return []


@pytest.fixture
def port(said: list[str]) -> Iterator[int]:
    """Of a doctor that serves on the loopback interface."""
    with listen("127.0.0.1") as listener:
        arguments = listener, DEADLINE, observe_once, said.append
        serving = threading.Thread(target=_serve_until_closed, args=arguments)
        serving.start()
        yield listener.getsockname()[1]
        listener.shutdown(socket.SHUT_RDWR)  # wakes `accept`
        serving.join(DEADLINE)
    assert not serving.is_alive()


def _serve_until_closed(*arguments: Any) -> None:
    with suppress(OSError):
        serve(*arguments)


@pytest.fixture
def short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wire, "IDLE_SECONDS", 0.2)
    monkeypatch.setattr(wire, "CONNECT_SECONDS", 0.5)


def is_alive(port: int) -> bool:
    with wire.connect("127.0.0.1", port) as connection:
        asking = Wire(connection)
        asking.say({"ask": "echo", "times": 1})
        asking.send(bytes(8))
        return len(asking.receive(8)) == 8


def test_a_link_is_measured_both_ways(port: int, said: list[str]) -> None:
    link = probe("127.0.0.1", port)
    assert (link.outcome, link.broke) == ("reached", "")
    assert (link.to_peer_port, link.from_peer_port) == ("reached", "reached")
    assert link.own_address == link.seen_address == link.peer_address == "127.0.0.1"
    assert link.facts is not None
    assert link.facts.sources_sha256 == observe_once().sources_sha256
    assert link.latency_seconds is not None
    assert link.latency_seconds > 0
    assert link.to_peer_bytes_per_second is not None
    assert link.from_peer_bytes_per_second is not None
    # The same clock: what is measured must not differ by more than it says.
    assert link.clock_offset_seconds is not None
    assert abs(link.clock_offset_seconds) <= link.clock_error_seconds
    assert said == ["127.0.0.1 asks"]


@given(st.binary(max_size=200))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_a_server_survives_any_bytes(port: int, garbage: bytes) -> None:
    with wire.connect("127.0.0.1", port) as connection:
        connection.sendall(garbage)
    assert is_alive(port)


MESSAGES = [
    {"ask": "no such thing"},
    {"ask": None},
    {"no": "question"},
    {"ask": "take", "bytes": 1 << 40},
    {"ask": "give", "bytes": -1},
    {"ask": "give", "bytes": 1e6},
    {"ask": "give", "bytes": True},
    {"ask": "echo", "times": "9"},
    {"ask": "echo"},
    {"ask": "connect", "port": 22},
    {"ask": "connect", "port": [1]},
]


@pytest.mark.parametrize("message", MESSAGES, ids=json.dumps)
def test_a_question_out_of_bounds_ends_the_session(
    port: int, said: list[str], message: dict[str, Any]
) -> None:
    with wire.connect("127.0.0.1", port) as connection:
        Wire(connection).say(message)
        assert connection.recv(1) == b""
    assert is_alive(port)
    assert "must be" in said[1] or "unknown question" in said[1]


@pytest.mark.parametrize(
    "raw",
    [
        struct.pack("!I", 1 << 31),
        struct.pack("!I", 60_000) + 60_000 * b"[",
        struct.pack("!I", 60_000) + 60_000 * b"1",
        struct.pack("!I", 2) + b"[]",
        struct.pack("!I", 1) + b"\xff",
    ],
    ids=["too long", "too deep", "too large a number", "no object", "no text"],
)
def test_what_is_no_message_ends_the_session(
    port: int, said: list[str], raw: bytes
) -> None:
    with wire.connect("127.0.0.1", port) as connection:
        connection.sendall(raw)
        assert connection.recv(1) == b""
    assert is_alive(port)
    assert said[1].startswith("127.0.0.1: a message")


@pytest.mark.usefixtures("short_waits")
def test_who_says_nothing_is_left(port: int, said: list[str]) -> None:
    with wire.connect("127.0.0.1", port) as silent:
        assert silent.recv(1) == b""
        assert is_alive(port)
    assert said[1] == "127.0.0.1: timed out"


def test_a_session_has_an_end(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wire, "SESSION_SECONDS", 0.0)
    with wire.connect("127.0.0.1", port) as connection:
        assert connection.recv(1) == b""


def answers(listener: socket.socket, reply: bytes, waiting: threading.Event) -> None:
    """Somebody who is no doctor."""
    connection, _ = listener.accept()
    with connection:
        connection.sendall(reply)
        waiting.wait(DEADLINE)


@pytest.mark.parametrize(
    ("reply", "broke"),
    [
        (b"", "round trips: timeout"),
        (struct.pack("!d", float("nan")), "round trips: a time"),
        (2000 * b"HTTP/1.1", "facts: a message of "),
        (bytes(3), "round trips: timeout"),
    ],
    ids=["silent", "nan", "http", "short"],
)
@pytest.mark.usefixtures("short_waits")
def test_who_is_no_doctor_is_told_apart(reply: bytes, broke: str) -> None:
    waiting = threading.Event()
    with listen("127.0.0.1") as listener:
        other = threading.Thread(target=answers, args=(listener, reply, waiting))
        other.start()
        link = probe("127.0.0.1", listener.getsockname()[1])
        waiting.set()
        other.join(DEADLINE)
    assert link.outcome == "reached"
    assert link.broke.startswith(broke)
    assert link.facts is None


@pytest.mark.parametrize(
    "change",
    [{"host": 5}, {"open_files": -1}, {"python": 501 * "x"}, {"out": []}],
    ids=str,
)
def test_facts_of_a_peer_are_checked(change: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="validation error"):
        Facts.model_validate({**observe_once().model_dump(), **change})


def test_a_port_where_nobody_listens_refuses() -> None:
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        number = bound.getsockname()[1]
        link = probe("127.0.0.1", number)
    assert link == Link(peer="127.0.0.1", port=number, outcome="refused")


def test_a_name_without_an_address_is_told() -> None:
    assert probe("no-such-host.invalid", 29400).outcome == "unknown name"


def free_port() -> str:
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        return str(bound.getsockname()[1])


def test_the_command_serves_on_loopback_and_is_asked() -> None:
    number = free_port()
    serving = subprocess.Popen(
        [sys.executable, "-m", "samestep", "doctor", "--serve", "--port", number],
        stderr=subprocess.PIPE,
        text=True,
    )
    assert serving.stderr is not None
    with serving:
        assert f"Listening on 127.0.0.1 port {number}" in serving.stderr.readline()
        connections = psutil.Process(serving.pid).net_connections()
        assert {one.laddr.ip for one in connections} == {"127.0.0.1"}
        ended = samestep("doctor", "--peer", f"127.0.0.1:{number}", "--json")
        serving.terminate()
    assert serving.returncode == 143
    content = json.loads(ended.stdout)
    assert content["link"]["broke"] == ""
    assert content["scale_flags"].startswith("--bandwidth ")
    subjects = {finding["subject"] for finding in content["findings"]}
    assert {"samestep on both", "latency", "bandwidth", "clocks"} <= subjects


def test_the_command_ends_after_its_time() -> None:
    ended = samestep("doctor", "--serve", "--port", free_port(), "--for", "0.1")
    assert (ended.returncode, ended.stdout) == (0, "")
