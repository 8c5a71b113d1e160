"""The command `samestep doctor`; imports little until it runs."""

import json
import sys
from typing import TYPE_CHECKING

import click

from samestep.errors import PlacementError, UsageError
from samestep.system.terminal import echo


if TYPE_CHECKING:
    from samestep.doctor.findings import Finding
    from samestep.doctor.observe import HostObservation
    from samestep.doctor.peer import Link


PORT = click.IntRange(1, 65535)


@click.command()
@click.option(
    "--peer",
    metavar="HOST[:PORT]",
    help="Also check the link to a machine where `samestep doctor --serve` runs.",
)
@click.option(
    "--serve", is_flag=True, help="Answer `samestep doctor --peer` of another machine."
)
@click.option(
    "--interface",
    metavar="IF|ADDRESS|NETWORK",
    help="Interface for trainings on several machines, such as eth0, 10.0.0.2 or "
    "10.0.0.0/24; --serve listens there, by default on the loopback interface.",
)
@click.option(
    "--port",
    type=PORT,
    default=29400,
    show_default=True,
    help="Port that --serve listens on, or that must be free for the rendezvous.",
)
@click.option(
    "--for",
    "seconds",
    type=click.FloatRange(0, min_open=True),
    default=600.0,
    show_default=True,
    help="Seconds after which --serve ends.",
)
@click.option(
    "--json", "as_json", is_flag=True, help="Print all findings and facts as JSON."
)
def doctor(
    peer: str | None,
    serve: bool,
    interface: str | None,
    port: int,
    seconds: float,
    as_json: bool,
) -> None:
    """Check this machine for problems before a training. Exit code 1 if there are any.

    With --peer, also compare two machines (versions, clocks, firewalls), and measure
    the network between them for `samestep scale`. --serve answers anyone who can reach
    it, without a password, with versions, limits and addresses of this machine.

    \b
    Examples:
      samestep doctor
      samestep doctor --serve --interface eth0      on one machine, and on another
      samestep doctor --peer 10.0.0.2
    """
    from samestep.system import network_interfaces

    if serve and (peer or as_json):
        raise UsageError("`--serve` only answers: leave out `--peer` and `--json`.")
    chosen = network_interfaces.resolve(interface).address if interface else ""
    if serve:
        _serve(chosen, port, seconds)
        return
    facts, link, findings = _examine(peer, chosen, port)
    echo(_shown(facts, link, findings, as_json))
    sys.exit(int(any(finding.level == "problem" for finding in findings)))


def parse_peer(text: str, port: int) -> tuple[str, int]:
    """Split `HOST`, `HOST:PORT`, `[IPV6]:PORT` or an IPv6 address into host and port.

    The port is `port` where the text has none. Raises PlacementError.
    """
    host, colon, number = text.rpartition(":")
    if not colon or text.endswith("]") or (":" in host and not host.endswith("]")):
        host, number = text, str(port)
    host = host.removeprefix("[").removesuffix("]")
    if not host or not number.isdecimal() or not 0 < int(number) < 1 << 16:
        raise PlacementError(
            f"A peer is HOST or HOST:PORT, such as `10.0.0.2:29400`; received `{text}`."
        )
    return host, int(number)


def peer_name(address: str, port: int) -> str:
    """Return the address and port as `parse_peer` reads them."""
    return f"[{address}]:{port}" if ":" in address else f"{address}:{port}"


def _examine(
    peer: str | None, chosen: str, port: int
) -> tuple["HostObservation", "Link | None", list["Finding"]]:
    from dataclasses import replace

    from samestep.doctor import check_host, check_link, check_peer
    from samestep.doctor.observe import observe
    from samestep.doctor.peer import probe

    facts = observe(chosen, port)
    link = probe(*parse_peer(peer, port), chosen) if peer else None
    findings = check_host.check(facts, chosen, link.own_address if link else "")
    if link:
        findings += check_link.check(link)
    if link and link.facts:
        findings += check_peer.compare(facts, link.facts)
        theirs = check_host.check(link.facts, used=link.peer_address)
        wrong = [finding for finding in theirs if finding.level != "ok"]
        findings += [replace(finding, host=link.facts.host) for finding in wrong]
    return facts, link, findings


def _shown(
    facts: "HostObservation",
    link: "Link | None",
    findings: list["Finding"],
    as_json: bool,
) -> str:
    from dataclasses import asdict

    from samestep.doctor.check_link import scale_flags
    from samestep.doctor.findings import text

    flags = scale_flags(link) if link else ""
    if as_json:
        content = {
            "findings": [asdict(finding) for finding in findings],
            "facts": facts.model_dump(),
            "link": link.model_dump() if link else None,
            "scale_flags": flags,
        }
        return json.dumps(content, indent=2)
    more = f"\n\nsamestep scale --nodes-up-to 8 {flags}" if flags else ""
    return text(findings) + more


def _serve(chosen: str, port: int, seconds: float) -> None:
    from functools import partial

    from samestep.doctor.observe import observe
    from samestep.doctor.peer import listen, serve

    address = chosen or "127.0.0.1"
    try:
        listener = listen(address, port)
    except OSError as error:
        raise PlacementError(
            f"The doctor must listen on {address} port {port}: {error.strerror}. Use "
            "another `--port`, or end what listens there."
        ) from None
    with listener:
        echo(
            f"Listening on {address} port {port} for {seconds:g} s, or until Ctrl-C. "
            "Anyone who can reach it sees versions, limits and addresses of this "
            "machine.\n"
            f"On the other machine: samestep doctor --peer {peer_name(address, port)}",
            err=True,
        )
        # Port 0: the doctor itself holds the one that would be checked.
        serve(listener, seconds, partial(observe, port=0), partial(echo, err=True))
