"""Judges what is between two machines. Pure: a link in, findings out."""

from samestep.doctor.findings import Finding
from samestep.doctor.peer_client import Link


PROBLEM_CLOCK_SECONDS = 5.0
"""torchrun takes a node for dead after 15 s, by the clocks of different machines."""
WARNING_CLOCK_SECONDS = 0.5
UNEVEN = 2.0
"""Bandwidth of one direction over that of the other."""
PACKET_BYTES = 1472
"""What fits into an Ethernet packet of 1,500 bytes besides the headers of a ping."""


def check(link: Link) -> list[Finding]:
    """All that could be found out."""
    if link.outcome != "reached":
        return [_not_reached(link)]
    where = f"{link.own_address} to {link.peer_address} port {link.port}"
    found = [Finding("ok", "connection", where), *_broke(link), *_translated(link)]
    found += _port(link, "port there", link.to_peer_port, link.own_address)
    found += _port(link, "port back", link.from_peer_port, link.peer_address)
    return found + _clock(link) + _speed(link)


def scale_flags(link: Link) -> str:
    """For `samestep scale`; the slower direction counts. Empty if not measured."""
    rates = link.to_peer_bytes_per_second, link.from_peer_bytes_per_second
    known = [rate for rate in rates if rate is not None]
    if not known or link.latency_seconds is None:
        return ""
    bits, latency = 8 * min(known), link.latency_seconds
    bandwidth = f"{bits / 1e9:.2f}Gbit" if bits >= 1e9 else f"{bits / 1e6:.3f}Mbit"
    return f"--bandwidth {bandwidth} --latency {1e6 * latency:.1f}us"


def _not_reached(link: Link) -> Finding:
    peer, port = link.peer, link.port
    allow = f"sudo iptables -I INPUT -p tcp -s THIS_MACHINE -j ACCEPT  # on {peer}"
    why, mend = {
        "refused": (
            "The machine answers, but nothing listens there, or its firewall rejects.",
            f"samestep doctor --serve --interface INTERFACE --port {port}  # on {peer}",
        ),
        "timeout": (
            "Nothing comes back: a firewall drops what is sent, or no machine is "
            "there. Trainings would wait until they time out.",
            f"ping -c 3 {peer}\n{allow}",
        ),
        "unreachable": (
            "This machine knows no way there, or a firewall on it says so.",
            f"ip route get {peer}",
        ),
        "unknown name": ("The name leads to no address.", f"getent hosts {peer}"),
    }.get(link.outcome, ("The connection could not be made.", f"ip route get {peer}"))
    return Finding(
        "problem", "connection", f"{peer} port {port}: {link.outcome}", why, mend
    )


def _broke(link: Link) -> list[Finding]:
    if not link.broke:
        return []
    if link.broke.endswith("timeout") and link.round_trips:
        return [
            Finding(
                "problem",
                "large messages",
                f"small ones arrive, but in the end: {link.broke}",
                "Packets of full size are lost: the largest size (MTU) of the two "
                "machines, or of what is between them, is not the same.",
                f"ping -M do -s {PACKET_BYTES} {link.peer_address}\n"
                "sudo ip link set dev INTERFACE mtu 1400",
            )
        ]
    return [
        Finding(
            "problem",
            "conversation",
            link.broke,
            "What listens there is no samestep doctor, or one of another version.",
            f"samestep doctor --serve --port {link.port}  # on {link.peer}",
        )
    ]


def _translated(link: Link) -> list[Finding]:
    if link.seen_address in ("", link.own_address):
        return []
    return [
        Finding(
            "problem",
            "addresses",
            f"this machine is {link.own_address}, the peer sees {link.seen_address}",
            "Addresses are translated (NAT) on the way. Workers tell others their own "
            "address, which leads nowhere from there.",
            "ip route get " + link.peer_address,
        )
    ]


def _port(link: Link, subject: str, outcome: str, source: str) -> list[Finding]:
    """A port of the system's choice, as Gloo's workers have."""
    if not outcome:
        return []
    target = link.peer_address if source == link.own_address else link.own_address
    if outcome == "reached":
        return [Finding("ok", subject, f"{target} can be reached from {source}")]
    return [
        Finding(
            "problem",
            subject,
            f"a free port of {target}, from {source}: {outcome}",
            "Workers connect to each other on ports of the system's choice. A firewall "
            + ("drops what is sent." if outcome == "timeout" else "rejects it."),
            f"sudo iptables -I INPUT -p tcp -s {source} -j ACCEPT  # on {target}",
        )
    ]


def _clock(link: Link) -> list[Finding]:
    if link.clock_offset_seconds is None:
        return []
    offset, error = link.clock_offset_seconds, link.clock_error_seconds
    way = "ahead" if offset >= 0 else "behind"
    seen = f"the peer's is {_seconds(abs(offset))} {way}, to within {_seconds(error)}"
    apart = abs(offset) - error
    if apart < WARNING_CLOCK_SECONDS:
        return [Finding("ok", "clocks", seen)]
    return [
        Finding(
            "problem" if apart >= PROBLEM_CLOCK_SECONDS else "warning",
            "clocks",
            seen,
            "torchrun's agents compare wall clocks: 15 s apart, healthy machines are "
            "taken for dead. Logs of both cannot be put in order.",
            "sudo timedatectl set-ntp true",
        )
    ]


def _speed(link: Link) -> list[Finding]:
    found = []
    if link.latency_seconds is not None:
        latency = f"{_seconds(link.latency_seconds)} one way, half the median of "
        seen = f"{latency}{link.round_trips} round trips"
        found.append(Finding("ok", "latency", seen))
    there, back = link.to_peer_bytes_per_second, link.from_peer_bytes_per_second
    if there is None or back is None:
        return found
    seen = f"{_rate(there)} there, {_rate(back)} back"
    if max(there, back) < UNEVEN * min(there, back):
        return [*found, Finding("ok", "bandwidth", seen)]
    return [
        *found,
        Finding(
            "warning",
            "bandwidth",
            seen,
            "Every step waits for the slower direction.",
            "ethtool INTERFACE  # on both: speed and duplex",
        ),
    ]


def _rate(bytes_per_second: float) -> str:
    bits = 8 * bytes_per_second
    return f"{bits / 1e9:.2f} Gbit/s" if bits >= 1e9 else f"{bits / 1e6:.1f} Mbit/s"


def _seconds(seconds: float) -> str:
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= size:
            return f"{seconds / size:.2f} {unit}"
    return f"{seconds * 1e6:.0f} us"
