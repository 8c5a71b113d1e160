"""The hosts that other tests run on: apart, sometimes cut off, and gone at the end."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from hosts import Host, Network, why_not
from test_launch import wait_until


pytestmark = pytest.mark.skipif(why_not() is not None, reason=str(why_not()))

PORT = "5000"
SERVE = f"""
import socket
with socket.create_server(("", {PORT})) as listener:
    print("listening", flush=True)
    connection = listener.accept()[0]
    while received := connection.recv(1 << 20):
        connection.sendall(received[-1:])
"""
"""Answers each byte that it has read the last of."""
ASK = f"""
import socket, sys
with socket.create_connection((sys.argv[1], {PORT})) as connection:
    connection.settimeout(0.3)
    for line in sys.stdin:
        if line == "ask\\n":
            connection.sendall(b".")
        try:
            print("answer" if connection.recv(1) else "closed", flush=True)
        except TimeoutError:
            print("silence", flush=True)
"""
SEND = f"""
import socket, sys, time
with socket.create_connection((sys.argv[1], {PORT})) as connection:
    begin = time.monotonic()
    connection.sendall(bytes({{size}}))
    connection.shutdown(socket.SHUT_WR)
    while connection.recv(1 << 20):
        pass
    print(time.monotonic() - begin)
"""
MAKE = """
import sys
from hosts import Network
with Network() as network:
    print(network.add().namespaces.pid, flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def network() -> Iterator[Network]:
    with Network(bandwidth="100mbit") as made:
        yield made


def python(code: str, *arguments: str) -> list[str]:
    return [sys.executable, "-c", code, *arguments]


def served(host: Host) -> None:
    """Something listens there from now on."""
    process = host.start(python(SERVE), stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "listening\n"


def test_hosts_have_names_addresses_processes_and_clocks_of_their_own(
    network: Network,
) -> None:
    code = (
        "import json, os, socket, time; print(json.dumps([socket.gethostname(), "
        "socket.gethostbyname('h1'), os.getppid(), time.monotonic()]))"
    )
    hosts = [network.add(), network.add()]
    (one, h1, parent, clock), (two, other, _, later) = [
        json.loads(host.run(*python(code))) for host in hosts
    ]
    assert (one, two) == ("h1", "h2")
    assert h1 == other == hosts[0].address
    assert parent == 0  # from outside
    assert 9_000 < later - clock < 11_000


def test_a_cut_host_is_silent_until_it_is_healed(network: Network) -> None:
    server, client = network.add(), network.add()
    served(server)
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    asking = python(ASK, server.name)
    process = client.start(asking, bufsize=1, text=True, **pipes)
    requests, answers = process.stdin, process.stdout
    assert requests is not None
    assert answers is not None

    def heard(request: str) -> str:
        requests.write(f"{request}\n")
        return str(answers.readline()).strip()

    assert heard("ask") == "answer"
    network.cut(server)
    assert heard("ask") == "silence"
    network.heal(server)
    wait_until(lambda: heard("listen") == "answer")
    network.cut(server)
    server.kill()
    assert heard("ask") == "silence"


def test_a_link_has_the_bandwidth_that_was_asked_for(network: Network) -> None:
    server, client = network.add(), network.add()
    served(server)
    size = 2_500_000  # 0.2 s at 100 Mbit/s
    sending = python(SEND.format(size=size), server.name)
    assert float(client.run(*sending)) > 0.19


def test_the_processes_of_a_host_share_its_cpu(network: Network) -> None:
    host = network.add()
    host.limit_cpu(0.2)
    code = (
        "import os, time; end = time.monotonic() + 0.5\nwhile time.monotonic() < end: "
        'pass\nos.write(1, b"%f " % time.process_time())'  # whole, beside the other's
    )
    both = f"{sys.executable} -c '{code}' & {sys.executable} -c '{code}'; wait"
    used = host.run("sh", "-c", both).split()
    assert sum(map(float, used)) < 0.4  # 1 without a limit, on two cores


def cgroups_of(pid: int) -> list[Path]:
    root = Path("/sys/fs/cgroup")
    return [*root.glob(f"*-{pid}"), *root.glob(f"cpu/*-{pid}")]


def test_nothing_is_left_of_hosts(network: Network) -> None:
    links = psutil.net_if_addrs().keys()
    host = network.add()
    host.limit_cpu(1.0)
    served(host)
    assert {port for _, port in host.listeners()} == {int(PORT)}
    pid = host.namespaces.pid
    assert cgroups_of(pid) != []
    assert psutil.pid_exists(pid)
    host.kill()
    assert not psutil.pid_exists(pid)
    assert psutil.net_if_addrs().keys() == links
    assert cgroups_of(pid) == []


def test_hosts_end_with_whoever_made_them() -> None:
    path = os.pathsep.join(sys.path)
    with subprocess.Popen(
        python(MAKE),
        env=os.environ | {"PYTHONPATH": path},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        pid = int(process.stdout.readline())
        assert psutil.pid_exists(pid)
        process.send_signal(signal.SIGKILL)
        wait_until(lambda: not psutil.pid_exists(pid))
