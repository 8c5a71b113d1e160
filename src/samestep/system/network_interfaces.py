"""This machine's network interfaces, and the one that Gloo would use."""

import os
import socket
from collections.abc import Mapping, Sequence
from ipaddress import ip_address, ip_network
from pathlib import Path
from typing import NamedTuple

import psutil

from samestep.errors import PlacementError, did_you_mean


GLOO_VARIABLE = "GLOO_SOCKET_IFNAME"
PORT_RANGE = Path("/proc/sys/net/ipv4/ip_local_port_range")


class Interface(NamedTuple):
    """An interface with one of its addresses, IPv4 or IPv6."""

    name: str
    address: str

    @property
    def is_loopback(self) -> bool:
        """Whether no other machine can reach it."""
        return ip_address(self.address).is_loopback


class Choice(NamedTuple):
    """The address that Gloo would listen on, and the reason."""

    address: str
    why: str


def all_interfaces() -> list[Interface]:
    """Return every address of every interface; psutil lists IPv4 first."""
    return [
        Interface(name, entry.address)
        for name, entries in psutil.net_if_addrs().items()
        for entry in entries
        if entry.family in (socket.AF_INET, socket.AF_INET6)
    ]


def resolve(text: str, known: Sequence[Interface] | None = None) -> Interface:
    """Return the interface with this name, address or network (`10.0.0.0/24`).

    A network lets the same command run on every machine. For a name, the address is the
    interface's first, which is the one that Gloo takes for `GLOO_SOCKET_IFNAME`.
    `known` are by default this machine's interfaces. Raises PlacementError.
    """
    known = all_interfaces() if known is None else known
    matches = [one for one in known if one.name == text] or _within(text, known)
    names = sorted({one.name for one in matches})
    if len(names) == 1:
        return matches[0]
    if names:
        problem = f"`{text}` fits several interfaces ({', '.join(names)}): name one."
    else:
        problem = (
            f"`{text}` is no interface, address or network of this machine."
            + did_you_mean(text, {word for one in known for word in one})
        )
    raise PlacementError(f"{problem} There are: {listed(known)}.")


def gloo_choice(
    environment: Mapping[str, str] = os.environ,
    known: Sequence[Interface] | None = None,
    host_addresses: Sequence[str] | None = None,
) -> Choice:
    """Return where Gloo listens by default.

    It is the interface that `GLOO_SOCKET_IFNAME` names, else the first address of the
    host's name, else the loopback interface, as in PyTorch's
    `ProcessGroupGloo::createDefaultDevice`. Raises PlacementError if the variable names
    no interface that has an address.
    """
    named = environment.get(GLOO_VARIABLE)
    if named:
        address = resolve(named.split(",")[0], known).address
        return Choice(address, f"{GLOO_VARIABLE} is `{named}`")
    name = socket.gethostname()
    addresses = own_addresses(name) if host_addresses is None else host_addresses
    if addresses:
        return Choice(addresses[0], f"this host's name, `{name}`, has this address")
    return Choice("127.0.0.1", f"this host's name, `{name}`, has no address of it")


def own_addresses(host: str) -> list[str]:
    """Return the host name's addresses that are this machine's, as resolved."""
    try:
        resolved = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except OSError:
        return []
    addresses = [str(address[0]) for *_, address in resolved]
    return [address for address in addresses if can_listen(address)]


def can_listen(address: str, port: int = 0) -> bool:
    """Return whether a socket can be bound there now; port 0: any port."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    try:
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((address, port))
    except OSError:
        return False
    return True


def listed(known: Sequence[Interface]) -> str:
    """Return text like `lo (127.0.0.1, ::1), eth0 (10.0.0.2)`."""
    addresses: dict[str, list[str]] = {}
    for name, address in known:
        addresses.setdefault(name, []).append(address)
    named = [f"{name} ({', '.join(some)})" for name, some in addresses.items()]
    return ", ".join(named) or "no interface with an address"


def warning(address: str, ports: Sequence[int]) -> str:
    """Return the security warning for trainings on several machines, one paragraph.

    `ports` are those known beforehand; the system chooses Gloo's.
    """
    first, last = ephemeral_ports()
    fixed = f"{', '.join(map(str, ports))} and " if ports else ""
    return (
        f"Workers listen on {address}, TCP ports {fixed}some of {first}-{last}. "
        "PyTorch's transport is unauthenticated and unencrypted, and Gloo has no TLS "
        "in this build: anyone who can reach these ports can read and change the "
        "training, and run programs as you. Use a private network only."
    )


def ephemeral_ports() -> tuple[int, int]:
    """Return the first and the last port that the system assigns for port 0."""
    try:
        first, last = map(int, PORT_RANGE.read_text().split())
    except (OSError, ValueError):
        return 49152, 65535  # RFC 6335, section 6; macOS
    return first, last


def _within(text: str, known: Sequence[Interface]) -> list[Interface]:
    """Return those in a network or with an address; its scope (`%eth0`) is ignored."""
    try:
        network = ip_network(text.partition("%")[0], strict=False)
    except ValueError:
        return []
    return [one for one in known if ip_address(one.address) in network]
