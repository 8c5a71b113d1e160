"""Two doctors: over real sockets on this machine, and between hosts of namespaces."""

import json
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any

import psutil
import pytest
from hosts import Host, Network, why_not
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from processes import reserved_port
from test_cli import samestep

from samestep.doctor import peer
from samestep.doctor.observe import HostObservation, observe
from samestep.doctor.peer import Link, Session, connect, listen, probe, serve
from samestep.system.network_interfaces import ephemeral_ports


DEADLINE = 60.0
observe_once = partial(observe, port=0)


@pytest.fixture
def log() -> list[str]:
    """The lines that the server logs."""
    return []


@pytest.fixture
def port(log: list[str]) -> Iterator[int]:
    """The port of a doctor that serves on the loopback interface."""
    with listen("127.0.0.1") as listener:
        arguments = listener, DEADLINE, observe_once, log.append
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
    monkeypatch.setattr(peer, "IDLE_SECONDS", 0.2)
    monkeypatch.setattr(peer, "CONNECT_SECONDS", 0.5)


def is_alive(port: int) -> bool:
    with connect("127.0.0.1", port) as connection:
        asking = Session(connection)
        asking.send(ask="echo", times=1)
        asking.write(bytes(8))
        return len(asking.read(8)) == 8


def test_a_link_is_measured_both_ways(port: int, log: list[str]) -> None:
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
    assert log == ["127.0.0.1 asks"]


@given(st.binary(max_size=200))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_server_survives_any_bytes(port: int, garbage: bytes) -> None:
    with connect("127.0.0.1", port) as connection:
        connection.sendall(garbage)
    assert is_alive(port)


def framed(message: dict[str, Any]) -> bytes:
    raw = json.dumps(message).encode()
    return struct.pack("!I", len(raw)) + raw


BAD_MESSAGES = {
    "unknown": framed({"ask": "no such thing"}),
    "null": framed({"ask": None}),
    "no question": framed({}),
    "unknown field": framed({"no": "question"}),
    "too much": framed({"ask": "take", "size": 1 << 40}),
    "negative": framed({"ask": "give", "size": -1}),
    "a float": framed({"ask": "give", "size": 1e6}),
    "a bool": framed({"ask": "give", "size": True}),
    "a string": framed({"ask": "echo", "times": "9"}),
    "a system port": framed({"ask": "connect", "port": 22}),
    "a list": framed({"ask": "connect", "port": [1]}),
    "too long": struct.pack("!I", 1 << 31),
    "too deep": struct.pack("!I", 60_000) + 60_000 * b"[",
    "too large a number": struct.pack("!I", 60_000) + 60_000 * b"1",
    "no object": struct.pack("!I", 2) + b"[]",
    "no text": struct.pack("!I", 1) + b"\xff",
}


@pytest.mark.parametrize("raw", BAD_MESSAGES.values(), ids=BAD_MESSAGES)
def test_a_message_out_of_bounds_ends_the_session(
    port: int, log: list[str], raw: bytes
) -> None:
    with connect("127.0.0.1", port) as connection:
        connection.sendall(raw)
        assert connection.recv(1) == b""
    assert is_alive(port)
    assert log[1].startswith("127.0.0.1: a message")


@pytest.mark.usefixtures("short_waits")
def test_a_silent_client_is_dropped(port: int, log: list[str]) -> None:
    with connect("127.0.0.1", port) as silent:
        assert silent.recv(1) == b""
        assert is_alive(port)
    assert log[1] == "127.0.0.1: timed out"


def test_a_session_has_an_end(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peer, "SESSION_SECONDS", 0.0)
    with connect("127.0.0.1", port) as connection:
        assert connection.recv(1) == b""


def answers(listener: socket.socket, reply: bytes, waiting: threading.Event) -> None:
    """Reply like a program that is not a doctor."""
    connection, _ = listener.accept()
    with connection:
        connection.sendall(reply)
        waiting.wait(DEADLINE)


@pytest.mark.parametrize(
    ("reply", "broke"),
    [
        (b"", "round trips: timeout"),
        (2000 * b"HTTP/1.1", "facts: a message of "),
        (bytes(3), "round trips: timeout"),
    ],
    ids=["silent", "http", "short"],
)
@pytest.mark.usefixtures("short_waits")
def test_another_program_than_the_doctor_is_recognized(
    reply: bytes, broke: str
) -> None:
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
    [
        {"host": 5},
        {"open_files": -1},
        {"memory_bytes": 10**400},
        {"python": 501 * "x"},
        {"gloo_address": "somewhere"},
        {"addresses": [("eth0", "$(reboot)")]},
    ],
    ids=lambda change: next(iter(change)),
)
def test_facts_of_a_peer_are_checked(change: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="validation error"):
        HostObservation.model_validate({**observe_once().model_dump(), **change})


def test_a_port_without_a_listener_refuses() -> None:
    with reserved_port() as number:
        link = probe("127.0.0.1", number)
    assert link == Link(peer="127.0.0.1", port=number, outcome="refused")


def test_a_name_without_an_address_is_reported() -> None:
    assert probe("no-such-host.invalid", 29400).outcome == "unknown name"


@pytest.fixture
def reserved() -> Iterator[str]:
    """A port for a doctor in another process."""
    with reserved_port() as number:
        yield str(number)


def test_the_command_serves_on_loopback_and_is_asked(reserved: str) -> None:
    serving = subprocess.Popen(
        [sys.executable, "-m", "samestep", "doctor", "--serve", "--port", reserved],
        stderr=subprocess.PIPE,
        text=True,
    )
    assert serving.stderr is not None
    with serving:
        assert f"Listening on 127.0.0.1 port {reserved}" in serving.stderr.readline()
        connections = psutil.Process(serving.pid).net_connections()
        assert {one.laddr.ip for one in connections} == {"127.0.0.1"}
        ended = samestep("doctor", "--peer", f"127.0.0.1:{reserved}", "--json")
        serving.terminate()
        serving.communicate(timeout=DEADLINE)  # it still prints that it was terminated
    assert serving.returncode == 143
    content = json.loads(ended.stdout)
    assert content["link"]["broke"] == ""
    assert content["scale_flags"].startswith("--bandwidth ")
    subjects = {finding["subject"] for finding in content["findings"]}
    assert {"samestep on both", "latency", "bandwidth", "clocks"} <= subjects


def test_the_command_ends_after_its_time(reserved: str) -> None:
    ended = samestep("doctor", "--serve", "--port", reserved, "--for", "0.1")
    assert (ended.returncode, ended.stdout) == (0, "")


needs_hosts = pytest.mark.skipif(why_not() is not None, reason=str(why_not()))
DOCTOR = [sys.executable, "-m", "samestep", "doctor"]
BITS_PER_SECOND = 20e6


@pytest.fixture(scope="module")
def hosts() -> Iterator[tuple[Host, Host]]:
    """Two machines; the doctor serves on the second."""
    with Network(bandwidth=f"{BITS_PER_SECOND:.0f}bit") as network:
        asking, asked = network.add(), network.add()
        command = [*DOCTOR, "--serve", "--interface", "10.0.0.0/24"]
        serving = asked.start(command, stderr=subprocess.PIPE, text=True)
        assert serving.stderr is not None
        assert serving.stderr.readline().startswith("Listening on 10.0.0.2 port 29400")
        yield asking, asked


def ask(asking: Host, peer: str) -> tuple[dict[str, Any], dict[str, str]]:
    """Return the doctor's answer, and the levels that are not ok by subject."""
    command = [*DOCTOR, "--peer", peer, "--json"]
    process = asking.start(command, stdout=subprocess.PIPE, text=True)
    content = json.loads(process.communicate(timeout=DEADLINE)[0])
    levels = {finding["subject"]: finding["level"] for finding in content["findings"]}
    bad = {one: level for one, level in levels.items() if level != "ok"}
    assert process.returncode == int("problem" in bad.values())
    return content, bad


@contextmanager
def dropped(host: Host, *which: str) -> Iterator[None]:
    """Drop packets from these ports on their way out of the host."""
    rule = ("ipproto", "tcp", *which)
    host.namespaces.call("ip", "rule", "add", *rule)
    yield
    host.namespaces.call("ip", "rule", "delete", *rule)


@contextmanager
def narrow(receiving: Host, sending: Host) -> Iterator[None]:
    """Let a host accept packets of at most 1,000 bytes, but announce 1,500."""
    tool = receiving.namespaces.call
    route = ("ip", "route", "change", "10.0.0.0/24", "dev", "eth0")
    tool("ip", "link", "set", "eth0", "mtu", "1000")
    tool(*route, "src", receiving.address, "advmss", "1460")
    sending.namespaces.call("ip", "link", "set", "eth0", "gso_max_segs", "1")
    yield
    tool(*route, "src", receiving.address)
    tool("ip", "link", "set", "eth0", "mtu", "1500")
    sending.namespaces.call("ip", "link", "set", "eth0", "gso_max_segs", "65535")


@needs_hosts
def test_between_hosts_bandwidth_clock_and_names_are_found(
    hosts: tuple[Host, Host],
) -> None:
    content, bad = ask(hosts[0], "h2")
    assert not {"connection", "port there", "port back", "clocks"} & bad.keys()
    assert hosts[1].listeners() == {("0200000A", 29400)}
    link = content["link"]
    for way in ("to_peer", "from_peer"):
        rate = 8 * link[f"{way}_bytes_per_second"]
        # The link caps it, but for the first burst; a busy machine may send less.
        assert 0 < rate < 1.2 * BITS_PER_SECOND
    names = [one["seen"] for one in content["findings"] if one["subject"] == "hosts"]
    assert names == ["h1 and h2"]
    assert content["facts"]["gloo_address"] == "10.0.0.1"
    assert link["facts"]["gloo_address"] == "10.0.0.2"


@needs_hosts
def test_a_port_that_drops_is_distinguished_from_one_that_refuses(
    hosts: tuple[Host, Host],
) -> None:
    with dropped(hosts[1], "sport", "29400", "blackhole"):
        content, _ = ask(hosts[0], "h2")
    assert content["link"]["outcome"] == "timeout"
    content, _ = ask(hosts[0], "h2:29401")
    assert content["link"]["outcome"] == "refused"


@needs_hosts
def test_a_firewall_that_only_knows_the_rendezvous_is_found(
    hosts: tuple[Host, Host],
) -> None:
    first, last = ephemeral_ports()
    chosen = f"{first}-{last}"
    with dropped(hosts[1], "sport", chosen, "dport", chosen, "unreachable"):
        content, bad = ask(hosts[0], "h2")
    assert content["link"]["to_peer_port"] == "timeout"
    assert content["link"]["from_peer_port"] == "unreachable"
    assert bad["port there"] == bad["port back"] == "problem"


@needs_hosts
def test_a_way_that_loses_large_packets_is_found(hosts: tuple[Host, Host]) -> None:
    asking, asked = hosts
    with narrow(asking, asked):
        content, bad = ask(asking, "h2")
    assert content["link"]["broke"] == "facts: timeout"
    assert bad["large messages"] == "problem"
