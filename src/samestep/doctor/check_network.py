"""Interfaces, addresses and ports of one machine. Pure: facts in, findings out."""

import shlex
from ipaddress import ip_address

from samestep.doctor.findings import Finding
from samestep.doctor.observe import HostObservation
from samestep.system.network_interfaces import GLOO_VARIABLE, Interface, listed


def check(facts: HostObservation, chosen: str = "", used: str = "") -> list[Finding]:
    """All that is here about one machine; `chosen` is the address of `--interface`."""
    return [interfaces(facts), gloo(facts, chosen, used), ports(facts)]


def interfaces(facts: HostObservation) -> Finding:
    """Can anybody reach this machine?"""
    known = [Interface(*one) for one in facts.addresses]
    if facts.down:
        return Finding(
            "warning",
            "interfaces",
            f"{listed(known)}; switched off: {', '.join(facts.down)}",
            "An address on an interface that is off can be chosen, and reaches nobody.",
            f"sudo ip link set {shlex.quote(facts.down[0])} up",
        )
    if all(one.is_loopback for one in known):
        return Finding(
            "warning",
            "interfaces",
            listed(known),
            "No other machine can reach this one; on this machine alone all is well.",
            "ip address",
        )
    return Finding("ok", "interfaces", listed(known))


def gloo(facts: HostObservation, chosen: str = "", used: str = "") -> Finding:
    """Where would Gloo listen by itself, and is that where others look for it?

    `used` is the address over which this machine and its peer have met.
    """
    if not facts.gloo_address:
        return Finding(
            "problem",
            "Gloo's address",
            facts.gloo_why,
            f"Gloo ends every training on several machines if {GLOO_VARIABLE} names no "
            "interface with an address.",
            f"unset {GLOO_VARIABLE}",
        )
    if chosen:
        return _gloo_on(facts, chosen)
    seen = f"{facts.gloo_address}: {facts.gloo_why}"
    is_loopback = ip_address(facts.gloo_address).is_loopback
    if facts.gloo_address == used or (not used and not is_loopback):
        return Finding("ok", "Gloo's address", seen)
    entry = f" (/etc/hosts: `{facts.hosts_line}`)" if facts.hosts_line else ""
    name = shlex.quote(facts.interface_of(used) or _example(facts))
    nobody = (
        "nobody else reaches a loopback address" if is_loopback else f"not on {used}"
    )
    return Finding(
        "warning",
        "Gloo's address",
        seen + entry,
        "Without an interface, PyTorch listens there on several machines, and "
        f"{nobody}: they wait until they time out. On this machine alone all is well.",
        f"samestep train --interface {name} ...\nexport {GLOO_VARIABLE}={name}",
    )


def _gloo_on(facts: HostObservation, chosen: str) -> Finding:
    """`--interface` sets Gloo's variable, which names an interface, not an address."""
    name = facts.interface_of(chosen)
    first = next((one for other, one in facts.addresses if other == name), chosen)
    if first == chosen:
        return Finding("ok", "Gloo's address", f"{chosen}, as asked for with {name}")
    return Finding(
        "warning",
        "Gloo's address",
        f"{first}: the first address of {name}, not {chosen}",
        "Gloo takes the first address of an interface. The machines exchange over it, "
        "so all of them must reach it.",
        f"ip address show dev {shlex.quote(name)}",
    )


def _example(facts: HostObservation) -> str:
    """The first interface that leads elsewhere."""
    known = (Interface(*one) for one in facts.addresses)
    return next((one.name for one in known if not one.is_loopback), "eth0")


def ports(facts: HostObservation) -> Finding:
    """Is the rendezvous' port free?"""
    port = facts.busy_port
    if port is None:
        return Finding("ok", "ports", "the rendezvous port is free")
    return Finding(
        "warning",
        "ports",
        f"port {port} is taken, or may not be listened on",
        "A rendezvous cannot listen where another program does; another training may "
        "be running.",
        f"ss -ltnp 'sport = :{port}'",
    )
