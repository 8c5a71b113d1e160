"""Checks of made-up machines and links."""

import shlex
from typing import Any

import pytest

from samestep.cli.doctor import parse_peer, peer_name
from samestep.doctor import check_link, check_peer, observe
from samestep.doctor.check_host import check
from samestep.doctor.findings import Finding, text
from samestep.doctor.observe import HostObservation
from samestep.doctor.peer import Link
from samestep.errors import PlacementError
from samestep.scaling import units


GB = 1_000_000_000
HEALTHY: dict[str, Any] = {
    "host": "a",
    "addresses": (("lo", "127.0.0.1"), ("eth0", "10.0.0.2"), ("eth0", "10.0.0.3")),
    "gloo_address": "10.0.0.2",
    "gloo_why": "this host's name, `a`, has this address",
    "logical_cpus": 8,
    "allowed_cpus": 8,
    "physical_cores": 4,
    "usable_cores": 4,
    "usable_cores_because": "the physical cores of this machine",
    "cpu_quota": None,
    "memory_limit_bytes": 16 * GB,
    "memory_bytes": 16 * GB,
    "available_bytes": 12 * GB,
    "swap_used_bytes": 0,
    "overcommit": 0,
    "shm_bytes": 8 * GB,
    "no_shared_memory": "",
    "open_files": 65536,
    "out": "/home/me",
    "out_free_bytes": 100 * GB,
    "out_is_writable": True,
    "processor": "A Processor",
    "instruction_set": "AVX512",
    "gpus": 0,
    "python": "3.11.7",
    "cuda": "",
    "sources_sha256": "5" * 64,
    "libraries": {"samestep": "0.1.0", "torch": "2.13.0+cpu", "numpy": "2.4.6"},
    "missing": {},
    "variables": {},
}


def made_up(**changes: Any) -> HostObservation:
    return HostObservation.model_validate({**HEALTHY, **changes})


def bad(findings: list[Finding]) -> list[Finding]:
    return [finding for finding in findings if finding.level != "ok"]


def test_a_healthy_machine_is_ok_throughout() -> None:
    assert bad(check(made_up())) == []


@pytest.mark.parametrize(
    ("changes", "level", "subject", "mend"),
    [
        ({"down": ["eth0"]}, "warning", "interfaces", "ip link set eth0 up"),
        (
            {"addresses": [("lo", "127.0.0.1")], "gloo_address": "127.0.0.1"},
            "warning",
            "interfaces",
            "ip address",
        ),
        (
            {"gloo_address": "127.0.1.1", "hosts_line": "127.0.1.1 a"},
            "warning",
            "Gloo's address",
            "--interface eth0",
        ),
        (
            {"gloo_address": "", "gloo_why": "`eth9` is no interface"},
            "problem",
            "Gloo's address",
            "unset GLOO_SOCKET_IFNAME",
        ),
        ({"busy_port": 29400}, "warning", "ports", "ss -ltnp"),
        ({"cpu_quota": 0.5}, "warning", "cores", "--cpus"),
        ({"available_bytes": GB // 2}, "warning", "memory", "ps aux"),
        ({"swap_used_bytes": 2 * GB}, "warning", "swap", "swapoff"),
        ({"overcommit": 2}, "warning", "overcommit", "vm.overcommit_memory=0"),
        (
            {"no_shared_memory": "Function not implemented"},
            "warning",
            "shared memory",
            "--exchange gloo",
        ),
        ({"shm_bytes": 64 << 20}, "warning", "/dev/shm", "--shm-size"),  # noqa: S108
        ({"open_files": 256}, "warning", "open files", "ulimit"),
        ({"out_free_bytes": GB // 2}, "warning", "disk", "du -s"),
        ({"out_is_writable": False}, "problem", "disk", "--out"),
        (
            {"variables": {"OMP_PROC_BIND": "close", "OMP_PLACES": "cores"}},
            "problem",
            "thread settings",
            "unset OMP_PROC_BIND OMP_PLACES",
        ),
        (
            {"variables": {"OMP_WAIT_POLICY": "ACTIVE"}},
            "warning",
            "thread settings",
            "unset OMP_WAIT_POLICY",
        ),
        (
            {"variables": {"MKL_CBWR": "AVX2"}},
            "warning",
            "kernels",
            "unset MKL_CBWR",
        ),
        (
            {"variables": {"OMP_THREAD_LIMIT": "1"}},
            "warning",
            "thread settings",
            "unset OMP_THREAD_LIMIT",
        ),
        (
            {"missing": {"report": ["jinja2", "scipy"]}},
            "warning",
            "extras",
            "pip install 'samestep[report]'",
        ),
        ({"cuda": "13.0"}, "warning", "GPUs", "pytorch.org"),
        ({"gpus": 2}, "warning", "GPUs", "pytorch.org"),
    ],
)
def test_a_fault_is_reported_with_the_command_that_fixes_it(
    changes: dict[str, Any], level: str, subject: str, mend: str
) -> None:
    findings = {finding.subject: finding for finding in bad(check(made_up(**changes)))}
    assert findings[subject].level == level
    assert findings[subject].why
    assert mend in findings[subject].mend


@pytest.mark.parametrize(
    "changes",
    [
        {"cpu_quota": 1.5, "usable_cores": 1},
        {"overcommit": None, "shm_bytes": None},
        {"variables": {"OMP_NUM_THREADS": "1", "OMP_PROC_BIND": "false"}},
        {"cuda": "13.0", "gpus": 1},
        {"allowed_cpus": 2},
        {"physical_cores": None},
        {"instruction_set": ""},
    ],
)
def test_harmless_differences_are_ok(changes: dict[str, Any]) -> None:
    assert bad(check(made_up(**changes))) == []


def test_an_address_that_gloo_would_not_take_is_reported() -> None:
    assert bad(check(made_up(), chosen="10.0.0.2")) == []
    (finding,) = bad(check(made_up(), chosen="10.0.0.3"))
    assert finding.seen == "10.0.0.2: the first address of eth0, not 10.0.0.3"
    # Another address than the one over which the machines have met.
    (finding,) = bad(check(made_up(gloo_address="127.0.0.1"), used="10.0.0.3"))
    assert finding.subject == "Gloo's address"


@pytest.mark.parametrize(
    ("changes", "level", "subject"),
    [
        ({"host": "a"}, "warning", "hosts"),
        ({"sources_sha256": "6" * 64}, "problem", "samestep on both"),
        (
            {"libraries": {**HEALTHY["libraries"], "torch": "2.13.0+cu130"}},
            "problem",
            "PyTorch on both",
        ),
        ({"instruction_set": "AVX2"}, "problem", "kernels on both"),
        (
            {"variables": {"ATEN_CPU_CAPABILITY": "avx2"}},
            "problem",
            "kernels on both",
        ),
        ({"processor": "Another"}, "problem", "kernels on both"),
        ({"variables": {"MKL_CBWR": "AVX2"}}, "problem", "kernels on both"),
        (
            {"libraries": {**HEALTHY["libraries"], "numpy": "2.3.0"}},
            "warning",
            "libraries on both",
        ),
        ({"python": "3.11.8"}, "warning", "libraries on both"),
        ({"python": "3.12.1"}, "problem", "libraries on both"),
        ({"libc": "musl 1.2"}, "problem", "libraries on both"),
    ],
)
def test_differences_between_machines_are_listed_by_host(
    changes: dict[str, Any], level: str, subject: str
) -> None:
    own = made_up()
    assert bad(check_peer.compare(own, made_up(host="b"))) == []
    (finding,) = bad(check_peer.compare(own, made_up(**{"host": "b", **changes})))
    assert (finding.level, finding.subject) == (level, subject)
    assert "a" in finding.seen
    assert subject == "hosts" or "b: " in finding.seen
    assert finding.mend


def test_the_lesser_instruction_set_is_what_both_can_use() -> None:
    (finding,) = bad(
        check_peer.compare(made_up(), made_up(host="b", instruction_set="AVX2"))
    )
    assert finding.mend == "export ATEN_CPU_CAPABILITY=avx2"


GOOD_LINK: dict[str, Any] = {
    "peer": "b",
    "port": 29400,
    "outcome": "reached",
    "own_address": "10.0.0.2",
    "seen_address": "10.0.0.2",
    "peer_address": "10.0.0.9",
    "latency_seconds": 50e-6,
    "round_trips": 1000,
    "clock_offset_seconds": 0.001,
    "clock_error_seconds": 40e-6,
    "to_peer_bytes_per_second": 117e6,
    "from_peer_bytes_per_second": 118e6,
    "to_peer_port": "reached",
    "from_peer_port": "reached",
}


@pytest.mark.parametrize(
    ("changes", "level", "subject", "says"),
    [
        ({"outcome": "refused"}, "problem", "connection", "doctor --serve"),
        ({"outcome": "timeout"}, "problem", "connection", "iptables"),
        ({"outcome": "unreachable"}, "problem", "connection", "ip route get b"),
        ({"outcome": "unknown name"}, "problem", "connection", "getent hosts b"),
        ({"outcome": "Invalid argument"}, "problem", "connection", "ip route"),
        ({"broke": "facts: timeout"}, "problem", "large messages", "mtu 1400"),
        ({"broke": "facts: not JSON"}, "problem", "conversation", "--port 29400"),
        ({"seen_address": "192.0.2.7"}, "problem", "addresses", "ip route get"),
        ({"to_peer_port": "timeout"}, "problem", "port there", "-s 10.0.0.2"),
        ({"from_peer_port": "refused"}, "problem", "port back", "-s 10.0.0.9"),
        ({"clock_offset_seconds": -1.0}, "warning", "clocks", "set-ntp"),
        ({"clock_offset_seconds": 20.0}, "problem", "clocks", "set-ntp"),
        ({"to_peer_bytes_per_second": 12e6}, "warning", "bandwidth", "ethtool"),
    ],
)
def test_symptoms_of_a_link_lead_to_their_cause(
    changes: dict[str, Any], level: str, subject: str, says: str
) -> None:
    assert bad(check_link.check(Link(**GOOD_LINK))) == []
    (finding,) = bad(check_link.check(Link(**{**GOOD_LINK, **changes})))
    assert (finding.level, finding.subject) == (level, subject)
    assert says in finding.mend


@pytest.mark.parametrize("rate", [1e4, 117e6, 1.25e9, 4e10])
@pytest.mark.parametrize("latency", [2e-6, 50e-6, 0.08])
def test_the_flags_for_scale_mean_what_was_measured(
    rate: float, latency: float
) -> None:
    measured = {
        "to_peer_bytes_per_second": 2 * rate,
        "from_peer_bytes_per_second": rate,
        "latency_seconds": latency,
    }
    flags = check_link.scale_flags(Link(**{**GOOD_LINK, **measured})).split()
    assert units.bandwidth(flags[1]) == pytest.approx(rate, rel=0.01)
    assert units.latency(flags[3]) == pytest.approx(latency, rel=0.02)
    assert check_link.scale_flags(Link(peer="b", port=1, outcome="refused")) == ""


@pytest.mark.parametrize(
    ("written", "peer"),
    [
        ("b", ("b", 7)),
        ("b:80", ("b", 80)),
        ("10.0.0.2:80", ("10.0.0.2", 80)),
        ("fd00::2", ("fd00::2", 7)),
        ("[fd00::2]", ("fd00::2", 7)),
        ("[fd00::2]:80", ("fd00::2", 80)),
    ],
)
def test_a_peer_is_a_host_with_or_without_a_port(
    written: str, peer: tuple[str, int]
) -> None:
    assert parse_peer(written, 7) == peer


@pytest.mark.parametrize("address", ["10.0.0.2", "fd00::2", "fe80::2%eth0"])
def test_the_doctor_that_serves_says_how_to_ask_it(address: str) -> None:
    assert parse_peer(peer_name(address, 80), 7) == (address, 80)


@pytest.mark.parametrize("written", ["", ":80", "b:", "b:0", "b:65536", "b:x"])
def test_text_that_names_no_peer_is_refused(written: str) -> None:
    with pytest.raises(PlacementError, match="A peer is HOST or HOST:PORT"):
        parse_peer(written, 7)


@pytest.mark.parametrize(
    ("hosts", "line"),
    [
        ("127.0.0.1 localhost\n127.0.1.1 box.lan box # Debian\n", "127.0.1.1"),
        ("::1 localhost box\n", "::1 localhost box"),
        ("10.0.0.2 box\n127.0.1.1 box\n", ""),
        ("# 127.0.1.1 box\n\n", ""),
        ("127.0.1.1 toolbox\n", ""),
    ],
)
def test_the_line_of_the_hosts_file_that_traps_gloo_is_found(
    hosts: str, line: str
) -> None:
    result = observe.trapping_line(hosts, "box")
    assert result.startswith(line) if line else result == ""


def test_missing_packages_are_listed_by_extra() -> None:
    lines = ["numpy>=2", "no-such<2; extra == 'report'", 'other; extra == "dev"']
    assert observe.missing_packages(lines) == {"report": ["no-such"]}
    assert observe.missing_packages(["numpy<3,>=2; extra == 'report'"]) == {}


def test_control_characters_of_a_peer_are_not_shown() -> None:
    hostile = made_up(host="\x1b[2Jb\r", processor="\u202eevil")
    assert (hostile.host, hostile.processor) == ("?[2Jb?", "?evil")


def test_no_name_of_a_peer_becomes_a_command_of_its_own() -> None:
    name, extra = "x; reboot", "a]' $(reboot) '"
    hostile = made_up(
        addresses=[(name, "10.0.0.2")],
        down=[name],
        gloo_address="127.0.1.1",
        missing={extra: ["b"]},
    )
    mends = "\n".join(finding.mend for finding in check(hostile))
    words = [word for line in mends.splitlines() for word in shlex.split(line)]
    assert words.count(name) == 2
    assert f"GLOO_SOCKET_IFNAME={name}" in words
    assert f"samestep[{extra}]" in words


def test_the_text_has_what_was_seen_why_and_the_command() -> None:
    shown = text([Finding("problem", "disk", "full", "It matters.", "rm x", "b")])
    words = "problem disk on b: full It matters. $ rm x problem 1, warning 0, ok 0"
    assert " ".join(shown.split()) == words
