"""Checks of interfaces, addresses and ports of one machine. Pure."""

import shlex
from ipaddress import ip_address

from samestep.doctor.findings import Finding, judge
from samestep.doctor.observe import HostObservation
from samestep.system.network_interfaces import GLOO_VARIABLE, Interface, listed


def check(host: HostObservation, chosen: str = "", used: str = "") -> list[Finding]:
    """Run all checks of this module.

    `chosen` is the address of `--interface`, `used` the one over which this machine and
    its peer are connected; either may be empty.
    """
    return [interfaces(host), gloo(host, chosen, used), ports(host)]


def interfaces(host: HostObservation) -> Finding:
    """Check that other machines can reach this one."""
    known = [Interface(*pair) for pair in host.addresses]
    if host.down:
        return Finding(
            "warning",
            "interfaces",
            f"{listed(known)}; switched off: {', '.join(host.down)}",
            "An interface that is off can be chosen by its address, but reaches no "
            "other machine.",
            f"sudo ip link set {shlex.quote(host.down[0])} up",
        )
    return judge(
        "interfaces",
        not all(interface.is_loopback for interface in known),
        listed(known),
        "No other machine can reach this one. Trainings on this machine alone work.",
        "ip address",
    )


def gloo(host: HostObservation, chosen: str = "", used: str = "") -> Finding:
    """Check that Gloo listens where other machines look for it; see `check`."""
    if not host.gloo_address:
        return Finding(
            "problem",
            "Gloo's address",
            host.gloo_why,
            f"Gloo ends every training on several machines if {GLOO_VARIABLE} names no "
            "interface with an address.",
            f"unset {GLOO_VARIABLE}",
        )
    if chosen:
        return _gloo_on(host, chosen)
    seen = f"{host.gloo_address}: {host.gloo_why}"
    is_loopback = ip_address(host.gloo_address).is_loopback
    if host.gloo_address == used or (not used and not is_loopback):
        return Finding("ok", "Gloo's address", seen)
    entry = f" (/etc/hosts: `{host.hosts_line}`)" if host.hosts_line else ""
    name = shlex.quote(host.interface_of(used) or _first_interface(host))
    where = "on a loopback address" if is_loopback else f"not on {used}"
    return Finding(
        "warning",
        "Gloo's address",
        seen + entry,
        f"Without `--interface`, PyTorch listens there, {where}: the other machines "
        "would wait until they time out. Trainings on this machine alone work.",
        f"samestep train --interface {name} ...\nexport {GLOO_VARIABLE}={name}",
    )


def _gloo_on(host: HostObservation, chosen: str) -> Finding:
    # `--interface` sets Gloo's variable, which names an interface, not an address.
    name = host.interface_of(chosen)
    first = next(
        (address for other, address in host.addresses if other == name), chosen
    )
    if first == chosen:
        return Finding("ok", "Gloo's address", f"{chosen}, as requested with {name}")
    return Finding(
        "warning",
        "Gloo's address",
        f"{first}: the first address of {name}, not {chosen}",
        "Gloo takes the first address of an interface. The machines exchange over it, "
        "so all of them must reach it.",
        f"ip address show dev {shlex.quote(name)}",
    )


def _first_interface(host: HostObservation) -> str:
    """Return the first interface that is not a loopback, as an example."""
    known = (Interface(*pair) for pair in host.addresses)
    return next((one.name for one in known if not one.is_loopback), "eth0")


def ports(host: HostObservation) -> Finding:
    """Check that the rendezvous' port is free."""
    port = host.busy_port
    taken = f"port {port} is in use, or listening on it is not allowed"
    return judge(
        "ports",
        port is None,
        "the rendezvous port is free" if port is None else taken,
        "A rendezvous cannot listen where another program does; another training may "
        "be running.",
        f"ss -ltnp 'sport = :{port}'",
    )
