"""Checks of the connection between two machines. Pure."""

from samestep.doctor.findings import Finding, judge
from samestep.doctor.peer import Link


PROBLEM_CLOCK_SECONDS = 5.0
"""torchrun counts a node as dead after 15 s, by the clocks of different machines."""
WARNING_CLOCK_SECONDS = 0.5
UNEVEN = 2.0
"""Bandwidth of one direction over that of the other."""
PACKET_BYTES = 1472
"""What fits into an Ethernet packet of 1,500 bytes besides the headers of a ping."""
UNREACHED = {
    "refused": (
        "The machine answers, but nothing listens there, or its firewall rejects.",
        "samestep doctor --serve --interface INTERFACE --port {port}  # on {peer}",
    ),
    "timeout": (
        "No answer arrives: a firewall drops the packets, or no machine is there. "
        "Trainings would wait until they time out.",
        "ping -c 3 {peer}\n"
        "sudo iptables -I INPUT -p tcp -s THIS_MACHINE -j ACCEPT  # on {peer}",
    ),
    "unreachable": (
        "This machine has no route there, or its own firewall forbids it.",
        "ip route get {peer}",
    ),
    "unknown name": ("The name has no address.", "getent hosts {peer}"),
}
"""Outcome of the first connection -> the reason and the commands."""


def check(link: Link) -> list[Finding]:
    """Run all checks of this module."""
    if link.outcome != "reached":
        return [_unreached(link)]
    seen = f"{link.own_address} to {link.peer_address} port {link.port}"
    findings = [
        Finding("ok", "connection", seen),
        _broke(link),
        _translated(link),
        _port("port there", link.to_peer_port, link.own_address, link.peer_address),
        _port("port back", link.from_peer_port, link.peer_address, link.own_address),
        _clock(link),
        _latency(link),
        _bandwidth(link),
    ]
    return [finding for finding in findings if finding]


def scale_flags(link: Link) -> str:
    """Return flags for `samestep scale`, by the slower direction; empty if unknown."""
    rates = link.to_peer_bytes_per_second, link.from_peer_bytes_per_second
    known = [rate for rate in rates if rate is not None]
    if not known or link.latency_seconds is None:
        return ""
    bits, latency = 8 * min(known), link.latency_seconds
    bandwidth = f"{bits / 1e9:.2f}Gbit" if bits >= 1e9 else f"{bits / 1e6:.3f}Mbit"
    return f"--bandwidth {bandwidth} --latency {1e6 * latency:.1f}us"


def _unreached(link: Link) -> Finding:
    other = ("The connection failed.", "ip route get {peer}")
    why, mend = UNREACHED.get(link.outcome, other)
    seen = f"{link.peer} port {link.port}: {link.outcome}"
    mend = mend.format(peer=link.peer, port=link.port)
    return Finding("problem", "connection", seen, why, mend)


def _broke(link: Link) -> Finding | None:
    if not link.broke:
        return None
    if link.broke.endswith("timeout") and link.round_trips:
        return Finding(
            "problem",
            "large messages",
            f"small ones arrive, but then: {link.broke}",
            "Packets of full size are lost: the largest size (MTU) of the two "
            "machines, or of a device between them, is not the same.",
            f"ping -M do -s {PACKET_BYTES} {link.peer_address}\n"
            "sudo ip link set dev INTERFACE mtu 1400",
        )
    return Finding(
        "problem",
        "conversation",
        link.broke,
        "The program that listens there is not a samestep doctor, or one of another "
        "version.",
        f"samestep doctor --serve --port {link.port}  # on {link.peer}",
    )


def _translated(link: Link) -> Finding | None:
    if link.seen_address in ("", link.own_address):
        return None
    return Finding(
        "problem",
        "addresses",
        f"this machine is {link.own_address}, the peer sees {link.seen_address}",
        "Addresses are translated (NAT) on the way. Workers announce their own "
        "address, which cannot be reached from there.",
        f"ip route get {link.peer_address}",
    )


def _port(subject: str, outcome: str, source: str, target: str) -> Finding | None:
    """Judge a connection to a port chosen by the system, as Gloo's workers make."""
    if not outcome:
        return None
    if outcome == "reached":
        return Finding("ok", subject, f"{target} can be reached from {source}")
    does = "drops the packets" if outcome == "timeout" else "rejects them"
    return Finding(
        "problem",
        subject,
        f"a free port of {target}, from {source}: {outcome}",
        "Workers connect to each other on ports that the system chooses. A firewall "
        f"{does}.",
        f"sudo iptables -I INPUT -p tcp -s {source} -j ACCEPT  # on {target}",
    )


def _clock(link: Link) -> Finding | None:
    if link.clock_offset_seconds is None:
        return None
    offset, error = link.clock_offset_seconds, link.clock_error_seconds
    way = "ahead" if offset >= 0 else "behind"
    apart = abs(offset) - error
    return judge(
        "clocks",
        apart < WARNING_CLOCK_SECONDS,
        f"the peer's is {_seconds(abs(offset))} {way}, to within {_seconds(error)}",
        "torchrun's agents compare wall clocks: if they are 15 s apart, healthy "
        "machines count as dead. The logs of both cannot be merged by time.",
        "sudo timedatectl set-ntp true",
        "problem" if apart >= PROBLEM_CLOCK_SECONDS else "warning",
    )


def _latency(link: Link) -> Finding | None:
    if link.latency_seconds is None:
        return None
    latency = f"{_seconds(link.latency_seconds)} one way, half the median of "
    return Finding("ok", "latency", f"{latency}{link.round_trips} round trips")


def _bandwidth(link: Link) -> Finding | None:
    there, back = link.to_peer_bytes_per_second, link.from_peer_bytes_per_second
    if there is None or back is None:
        return None
    return judge(
        "bandwidth",
        max(there, back) < UNEVEN * min(there, back),
        f"{_rate(there)} there, {_rate(back)} back",
        "Every step waits for the slower direction.",
        "ethtool INTERFACE  # on both: speed and duplex",
    )


def _rate(bytes_per_second: float) -> str:
    bits = 8 * bytes_per_second
    return f"{bits / 1e9:.2f} Gbit/s" if bits >= 1e9 else f"{bits / 1e6:.1f} Mbit/s"


def _seconds(seconds: float) -> str:
    if seconds >= 1:
        return f"{seconds:.2f} s"
    return f"{seconds * 1e3:.2f} ms" if seconds >= 1e-3 else f"{seconds * 1e6:.0f} us"
