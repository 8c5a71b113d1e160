"""Made-up machines for the rules; this one for what the system and Gloo really do."""

import ipaddress
import re
import socket

import pytest
from hypothesis import given
from hypothesis import strategies as st

from samestep import PlacementError
from samestep.system import network_interfaces
from samestep.system.network_interfaces import Interface, gloo_choice, resolve


MACHINE = [
    Interface("lo", "127.0.0.1"),
    Interface("lo", "::1"),
    Interface("eth0", "10.0.0.2"),
    Interface("eth0", "10.0.0.3"),
    Interface("eth0", "fd00::2"),
    Interface("eth0", "fe80::2%eth0"),
    Interface("ib0", "10.1.0.2"),
]

names = st.from_regex(r"[a-z]{2,6}[0-9]{1,3}", fullmatch=True)
addresses = st.one_of(st.ip_addresses(v=4), st.ip_addresses(v=6)).map(str)
machines = st.dictionaries(
    names, st.lists(addresses, min_size=1, max_size=3, unique=True), max_size=4
).map(lambda found: [Interface(name, one) for name in found for one in found[name]])


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("eth0", MACHINE[2]),
        ("10.0.0.3", MACHINE[3]),
        ("10.0.0.0/24", MACHINE[2]),
        ("10.1.0.99/16", MACHINE[6]),
        ("fd00::/64", MACHINE[4]),
        ("fd00:0::2", MACHINE[4]),
        ("fe80::2", MACHINE[5]),
        ("fe80::2%eth0", MACHINE[5]),
        ("lo", MACHINE[0]),
    ],
)
def test_names_addresses_and_networks_are_resolved(
    text: str, expected: Interface
) -> None:
    assert resolve(text, MACHINE) == expected


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("eth1", "no interface, address or network.* Did you mean `eth0`"),
        ("10.0.0.4", "no interface, address or network of this machine"),
        ("::", "no interface, address or network of this machine"),
        ("10.0.0.0/33", "no interface, address or network of this machine"),
        ("10.0.0.0/8", r"fits several interfaces \(eth0, ib0\): name one"),
        ("0.0.0.0/0", r"fits several interfaces \(eth0, ib0, lo\)"),
        ("", "no interface"),
    ],
)
def test_what_is_not_there_is_refused_with_what_is(text: str, says: str) -> None:
    with pytest.raises(PlacementError, match=says) as caught:
        resolve(text, MACHINE)
    assert "eth0 (10.0.0.2, 10.0.0.3, fd00::2, fe80::2%eth0)" in str(caught.value)


@given(machines)
def test_every_name_leads_to_its_first_address(machine: list[Interface]) -> None:
    for one in machine:
        assert resolve(one.name, machine) == next(
            other for other in machine if other.name == one.name
        )


@given(machines)
def test_every_address_leads_to_an_interface_that_has_it(
    machine: list[Interface],
) -> None:
    for one in machine:
        if len({other.name for other in machine if other.address == one.address}) == 1:
            assert resolve(one.address, machine) == one


@given(machines, addresses, st.integers(0, 128))
def test_a_network_leads_to_one_of_its_addresses_or_is_refused(
    machine: list[Interface], address: str, length: int
) -> None:
    bits = ipaddress.ip_address(address).max_prefixlen
    network = ipaddress.ip_network(f"{address}/{min(length, bits)}", strict=False)
    inside = [
        one for one in machine if ipaddress.ip_address(one.address) in network
    ]  # an address of the other version is in no network
    if len({one.name for one in inside}) == 1:
        assert resolve(str(network), machine) == inside[0]
    else:
        with pytest.raises(PlacementError):
            resolve(str(network), machine)


@given(machines, st.text(max_size=20))
def test_any_text_is_resolved_or_refused_with_the_list(
    machine: list[Interface], text: str
) -> None:
    try:
        found = resolve(text, machine)
    except PlacementError as error:
        assert not machine or network_interfaces.listed(machine) in str(error)  # noqa: PT017
    else:
        assert found in machine


def test_the_loopback_interface_of_this_machine_is_found_by_name_and_network() -> None:
    found = resolve("127.0.0.0/8")
    assert found.is_loopback
    assert resolve(found.name) == found
    with socket.create_server((found.address, 0)):
        pass


def test_gloo_takes_the_variable_then_the_hosts_name_then_loopback() -> None:
    variable = {"GLOO_SOCKET_IFNAME": "ib0"}
    assert gloo_choice(variable, MACHINE, ["10.0.0.2"]).address == "10.1.0.2"
    assert gloo_choice({}, MACHINE, ["127.0.1.1", "10.0.0.2"]).address == "127.0.1.1"
    assert gloo_choice({}, MACHINE, []).address == "127.0.0.1"
    with pytest.raises(PlacementError, match="`ib1` is no interface"):
        gloo_choice({"GLOO_SOCKET_IFNAME": "ib1"}, MACHINE)


def test_own_addresses_are_those_that_can_be_listened_on() -> None:
    assert network_interfaces.own_addresses("localhost")
    assert network_interfaces.own_addresses("192.0.2.123") == []  # TEST-NET-1, nobody's
    assert network_interfaces.own_addresses("no-such-host.invalid") == []


def test_the_warning_names_address_ports_and_threat() -> None:
    text = network_interfaces.warning("10.0.0.2", [29400])
    assert re.search(r"10\.0\.0\.2, TCP ports 29400 and some of \d+-\d+\.", text)
    for word in ("unauthenticated", "unencrypted", "no TLS", "private network"):
        assert word in text
