"""Hosts on one Linux machine: a library for tests and benchmarks; needs root.

    with Network(bandwidth="1gbit") as network:
        one, two = network.add(), network.add()
        process = one.start(["ping", "-c", "1", two.name])
        network.cut(two)        # silently: packets vanish without an error
        network.heal(two)
        one.kill()              # all that runs on it

A host has namespaces of its own: network (one address on `eth0`, and its loopback
interface), processes, host name, mounts, and a clock that started at another time, as
other machines' monotonic clocks do. Files are shared with this machine, except
`/etc/hosts`, where the hosts know each other. A bridge in one more namespace connects
them. Nothing is visible outside, and all of it ends with the process that made it,
however that ends; only the CPU quotas' cgroups need `close`.
"""

import functools
import itertools
import os
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Self

import psutil
from quota import Quota


DEADLINE = 20.0
"""Seconds that a command of the machinery may take on a busy machine."""
APART_S = 10_000
"""Between the clocks of two hosts."""
BURST = "128kb"
"""What a link may send at once, a millisecond at 1 Gbit/s. Below the largest packet
that the kernel hands to a link in one go it cuts them up, which costs so much that TCP
in both directions reached only 63% of the rate."""
ISOLATE = ("unshare", "--net", "--mount", "--uts", "--pid", "--fork", "--kill-child")
PROBE = (
    "mount -t proc proc /proc && ip link add bridge0 type bridge && "
    "ip link add port1 type veth peer name eth0 && "
    f"tc qdisc add dev port1 root tbf rate 1gbit burst {BURST} latency 10ms"
)


@functools.cache
def why_not() -> str | None:
    """Return what forbids making hosts here, or None."""
    tools = ("unshare", "nsenter", "ip", "tc")
    missing = [tool for tool in tools if shutil.which(tool) is None]
    if missing:
        return f"hosts need {', '.join(missing)}"
    command = [*ISOLATE, "--time", "sh", "-c", PROBE]
    tried = subprocess.run(command, check=False, capture_output=True, text=True)
    if tried.returncode:
        return f"hosts need root and network namespaces: {tried.stderr.strip()}"
    return None


class Namespaces:
    """What keeps a set of namespaces, until it is killed."""

    def __init__(self, options: Sequence[str], script: str) -> None:
        # It waits for input that never comes, so it also ends when we are killed.
        # Orphans inside become its children; ignoring SIGCHLD reaps them. A shell would
        # not ignore it: the end of an orphan would end its `read`, and with it all.
        waiting = f"set -e; {script}; echo ready; trap '' CHLD; exec cat > /dev/null"
        self._unshare = subprocess.Popen(
            [*ISOLATE, *options, "sh", "-c", waiting],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert self._unshare.stdout is not None
        assert self._unshare.stderr is not None
        if self._unshare.stdout.readline() != "ready\n":
            raise OSError(self._unshare.stderr.read())
        self.pid: int = psutil.Process(self._unshare.pid).children()[0].pid
        """The id, outside, of the first process inside."""

    def enter(self, *which: str) -> list[str]:
        """Return the start of a command that runs inside, in `which` (net, pid, ..)."""
        return ["nsenter", f"--target={self.pid}", *(f"--{name}" for name in which)]

    def call(self, *command: str) -> str:
        """Return the output of a tool for the network inside."""
        ended = subprocess.run(
            [*self.enter("net"), *command],
            check=False,
            capture_output=True,
            text=True,
            timeout=DEADLINE,
        )
        if ended.returncode:
            raise OSError(f"{' '.join(command)}: {ended.stderr.strip()}")
        return ended.stdout

    def kill(self) -> None:
        """Kill every process inside, at once; none is left when this returns."""
        with self._unshare:
            if self._unshare.poll() is None:
                os.kill(self.pid, signal.SIGKILL)


class Host:
    """A machine, as far as the programs on it can tell."""

    def __init__(self, name: str, address: str, names: Path, clock: int) -> None:
        self.name, self.address = name, address
        clocks = ("--time", f"--monotonic={clock}", f"--boottime={clock}")
        self.namespaces = Namespaces(
            clocks,
            f"mount -t proc proc /proc; mount --bind '{names}' /etc/hosts; "
            f"hostname {name}; ip link set lo up",
        )
        self._quota: Quota | None = None
        self._started: list[subprocess.Popen[Any]] = []

    def limit_cpu(self, cores: float, period_us: int = 100_000) -> None:
        """Limit it to part of a core, or not at all; the first call is for what starts
        later, further ones change its limit.
        """
        if self._quota is None:
            self._quota = Quota(self.namespaces.pid, 1.0, period_us)
        self._quota.set(cores)

    def start(self, command: Sequence[str], **options: Any) -> subprocess.Popen[Any]:
        """A program here, in the same directory; the exit code is the Popen's, but see
        `signal`.
        """
        joined = self._quota.joined if self._quota else []
        inside = self.namespaces.enter("net", "mount", "uts", "pid", "time")
        there = ["env", f"--chdir={Path.cwd()}", *command]
        process = subprocess.Popen([*joined, *inside, *there], **options)
        self._started.append(process)
        return process

    def run(self, *command: str, timeout: float = DEADLINE) -> str:
        """Return what the program prints; it must succeed."""
        process = self.start(command, stdout=subprocess.PIPE, text=True)
        try:
            printed, _ = process.communicate(timeout=timeout)
        finally:
            self.signal(process, signal.SIGKILL)
        if process.returncode:
            raise OSError(f"{' '.join(command)}: exit code {process.returncode}")
        return str(printed)

    @staticmethod
    def signal(process: subprocess.Popen[Any], number: int) -> None:
        """Signal what `start` started: the Popen itself is only what waits for it."""
        if process.poll() is None:
            for inside in psutil.Process(process.pid).children():
                inside.send_signal(number)

    def listeners(self) -> set[tuple[str, int]]:
        """(address in the kernel's hexadecimal form, port) of every TCP listener."""
        found = set()
        for table in ("tcp", "tcp6"):
            lines = Path(f"/proc/{self.namespaces.pid}/net/{table}").read_text()
            for fields in map(str.split, lines.splitlines()[1:]):
                if fields[3] == "0A":
                    address, port = fields[1].split(":")
                    found.add((address, int(port, 16)))
        return found

    def kill(self) -> None:
        """Every process at once. Its kernel still closes their connections: after
        `cut` the others do not notice, as after a power failure.
        """
        self.namespaces.kill()
        if self._quota:
            self._quota.close()
            self._quota = None
        for process in self._started:
            process.wait(DEADLINE)

    def close(self) -> None:
        """Kill it, and close the pipes to what it ran."""
        self.kill()
        for process in self._started:
            with process:
                pass


class Network:
    """A switch with hosts.

    Args:
        bandwidth: of each link, in each direction, as `tc` writes it; none: unlimited.
    """

    def __init__(self, bandwidth: str | None = None) -> None:
        self._bandwidth = bandwidth
        self._numbers = itertools.count(1)
        self._closing = ExitStack()

    def __enter__(self) -> Self:
        self._switch = Namespaces((), "ip link add bridge0 type bridge")
        self._closing.callback(self._switch.kill)
        self._switch.call("ip", "link", "set", "bridge0", "up")
        directory = tempfile.TemporaryDirectory(prefix="samestep-hosts-")
        self._names = Path(self._closing.enter_context(directory)) / "hosts"
        self._names.write_text("127.0.0.1 localhost\n")
        return self

    def __exit__(self, *_: object) -> None:
        self._closing.close()

    def add(self) -> Host:
        """Add a host, named h1, h2, ..., with the address 10.0.0.1, 10.0.0.2, ..."""
        number = next(self._numbers)
        name, address = f"h{number}", f"10.0.0.{number}"
        with self._names.open("a") as names:
            names.write(f"{address} {name}\n")
        host = Host(name, address, self._names, APART_S * number)
        self._closing.callback(host.close)
        self._plug(host)
        return host

    def cut(self, host: Host) -> None:
        """Drop its packets; its link stays up, no connection is reset."""
        self._switch.call("ip", "link", "set", _port(host), "nomaster")

    def heal(self, host: Host) -> None:
        """Undo `cut`."""
        self._switch.call("ip", "link", "set", _port(host), "master", "bridge0")

    def _plug(self, host: Host) -> None:
        inside, port = host.namespaces, _port(host)
        peer = ("peer", "name", "eth0", "netns", str(inside.pid))
        self._switch.call("ip", "link", "add", port, "type", "veth", *peer)
        inside.call("ip", "address", "add", f"{host.address}/24", "dev", "eth0")
        inside.call("ip", "link", "set", "eth0", "up")
        self._switch.call("ip", "link", "set", port, "up")
        self.heal(host)
        for end, device in ((inside, "eth0"), (self._switch, port)):
            if self._bandwidth:
                rate = ("rate", self._bandwidth, "burst", BURST, "latency", "50ms")
                end.call("tc", "qdisc", "add", "dev", device, "root", "tbf", *rate)


def _port(host: Host) -> str:
    """Return the switch's end of its cable."""
    return f"to-{host.name}"
