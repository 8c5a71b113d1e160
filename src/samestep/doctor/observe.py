"""What is so on one machine, as far as trainings care; without importing torch."""

import os
import re
import resource
import shutil
import socket
import sys
from collections.abc import Iterable
from importlib import metadata
from importlib.util import find_spec
from ipaddress import ip_address
from pathlib import Path
from typing import Annotated, Any, Literal

import psutil
from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from samestep.errors import PlacementError
from samestep.system import barrier, conditions, machine, network_interfaces


RENDEZVOUS_PORT = 29400
"""Where torchrun's rendezvous listens unless it is told otherwise."""
VARIABLES = (
    *machine.THREAD_VARIABLES,
    "OMP_PLACES",
    "GOMP_CPU_AFFINITY",
    "OMP_WAIT_POLICY",
    "OMP_THREAD_LIMIT",
    "OMP_DYNAMIC",
    "OMP_MAX_ACTIVE_LEVELS",
    *conditions.VARIABLES,
    "TORCH_GLOO_LAZY_INIT",
    network_interfaces.GLOO_VARIABLE,
)
"""Only of these are values looked at."""
CPU_FLAGS = {
    "AVX512": {"avx512f", "avx512vl", "avx512bw", "avx512dq", "fma"},
    "AVX2": {"avx2", "fma"},
}
"""What PyTorch asks of a processor for the kernels of this name, the best first."""
FOR_DEVELOPERS = ("dev", "benchmarks")
"""Extras that no training needs."""
MOST = 500
"""Letters of a text, and entries of a list, that a peer may send."""
CPUINFO, HOSTS = Path("/proc/cpuinfo"), Path("/etc/hosts")
OVERCOMMIT, SHM = Path("/proc/sys/vm/overcommit_memory"), Path("/dev/shm")  # noqa: S108


def printable(text: str) -> str:
    """Without what would move the cursor of a terminal."""
    return "".join(one if one.isprintable() else "?" for one in text)


def _address(text: str) -> str:
    """Raises ValueError if it is none."""
    ip_address(text)
    return text


Text = Annotated[str, Field(max_length=MOST), AfterValidator(printable)]
Address = Annotated[Text, AfterValidator(_address)]
Size = Annotated[int, Field(ge=0, lt=1 << 64)]
"""Bytes, or how many."""
Texts = Annotated[tuple[Text, ...], Field(max_length=MOST)]


class HostObservation(BaseModel):
    """Of one machine; those of a peer have come over the network and are checked."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    host: Text
    addresses: Annotated[tuple[tuple[Text, Address], ...], Field(max_length=MOST)]
    """(interface, address)"""
    down: Texts = ()
    """Interfaces that have an address and are switched off."""
    gloo_address: Address | Literal[""] = ""
    """Where Gloo would listen by itself; empty if it could not."""
    gloo_why: Text = ""
    hosts_line: Text = ""
    """Of /etc/hosts, if it gives the host's name a loopback address."""
    busy_port: Size | None = None
    """That of the rendezvous, if it is taken on the address that is asked about."""

    logical_cpus: Size
    allowed_cpus: Size
    """Those in the affinity mask."""
    physical_cores: Size | None
    usable_cores: Size
    usable_cores_because: Text
    cpu_quota: float | None

    memory_limit_bytes: Size
    memory_bytes: Size
    available_bytes: Size
    swap_used_bytes: Size
    overcommit: int | None
    """As in vm.overcommit_memory; None where there is none."""
    shm_bytes: Size | None
    """The size of /dev/shm."""
    no_shared_memory: Text
    """Why the exchange `shared` does not work; empty if it does."""
    open_files: Size
    out: Text
    """Where runs go."""
    out_free_bytes: Size
    out_is_writable: bool

    processor: Text
    instruction_set: Text
    gpus: Size
    """Devices of NVIDIA's driver."""
    python: Text
    libc: Text = ""
    cuda: Text
    """The version that PyTorch was built for; empty: a build for CPUs."""
    sources_sha256: Text
    """Of samestep itself."""
    libraries: Annotated[dict[Text, Text], Field(max_length=100)]
    missing: Annotated[dict[Text, Texts], Field(max_length=100)]
    """Packages of an extra that are not installed."""
    variables: Annotated[dict[Text, Text], Field(max_length=100)]

    def interface_of(self, address: str) -> str:
        """The name; empty if no interface has the address."""
        return next((name for name, one in self.addresses if one == address), "")


def observe(address: str = "", port: int = RENDEZVOUS_PORT) -> HostObservation:
    """This machine, now; whether `port` is free is tried on `address`, "" being all."""
    described = machine.describe()
    out = _nearest(Path("runs"))
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return HostObservation.model_validate(
        {
            **described,
            **_network(address, port),
            **_memory(),
            "host": socket.gethostname(),
            "allowed_cpus": len(described["affinity"]),
            "open_files": sys.maxsize if soft == resource.RLIM_INFINITY else soft,
            "out": str(out)[:MOST],
            "out_free_bytes": shutil.disk_usage(out).free,
            "out_is_writable": os.access(out, os.W_OK),
            "instruction_set": instruction_set(_read(CPUINFO)),
            "libc": conditions.of_machine()["libc"],
            "gpus": len(list(Path("/dev").glob("nvidia[0-9]*"))),
            "cuda": _cuda(),
            "sources_sha256": machine.checksum_of_sources(),
            "missing": missing_packages(metadata.requires("samestep") or []),
            "variables": {
                name: os.environ[name][:MOST]
                for name in VARIABLES
                if name in os.environ
            },
        }
    )


def instruction_set(cpuinfo: str) -> str:
    """The name of PyTorch's kernels for the first processor of /proc/cpuinfo.

    As `torch.backends.cpu.get_cpu_capability` says on x86 unless ATEN_CPU_CAPABILITY
    asks for less; empty on other processors.
    """
    found = re.search(r"^flags\s*:(.*)$", cpuinfo, re.MULTILINE)
    if found is None:
        return ""
    flags = set(found[1].split())
    return next((name for name, need in CPU_FLAGS.items() if need <= flags), "DEFAULT")


def trapping_line(hosts: str, host: str) -> str:
    """The first line of /etc/hosts about this host, if it names a loopback address."""
    for line in hosts.splitlines():
        address, *names = line.partition("#")[0].split() or [""]
        if host in names:
            return line.strip() if address.startswith(("127.", "::1")) else ""
    return ""


def missing_packages(requirements: Iterable[str]) -> dict[str, list[str]]:
    """What is not installed of each extra, from lines such as `x>=1; extra == 'a'`."""
    missing: dict[str, list[str]] = {}
    for line in requirements:
        found = re.match(r"([\w.-]+).*;\s*extra\s*==\s*['\"](\w+)['\"]", line)
        if found and found[2] not in FOR_DEVELOPERS and not _is_installed(found[1]):
            missing.setdefault(found[2], []).append(found[1])
    return missing


def _is_installed(package: str) -> bool:
    try:
        metadata.version(package)
    except metadata.PackageNotFoundError:
        return False
    return True


def _network(address: str, port: int) -> dict[str, Any]:
    known, host = network_interfaces.all_interfaces(), socket.gethostname()
    states = psutil.net_if_stats().items()
    off = {name for name, state in states if not state.isup}
    try:
        choice = network_interfaces.gloo_choice(known=known)
    except PlacementError as error:
        choice = network_interfaces.Choice("", str(error)[:MOST])
    is_busy = not network_interfaces.can_listen(address, port)
    return {
        "addresses": known[:MOST],
        "down": sorted(off & {one.name for one in known}),
        "gloo_address": choice.address,
        "gloo_why": choice.why,
        "hosts_line": trapping_line(_read(HOSTS), host)[:MOST],
        "busy_port": port if is_busy else None,
    }


def _memory() -> dict[str, Any]:
    overcommit = _read(OVERCOMMIT).strip()
    return {
        "available_bytes": machine.available_memory(),
        "swap_used_bytes": psutil.swap_memory().used,
        "overcommit": int(overcommit) if overcommit else None,
        "shm_bytes": shutil.disk_usage(SHM).total if SHM.is_dir() else None,
        "no_shared_memory": _no_shared_memory(),
    }


def _no_shared_memory() -> str:
    try:
        os.close(barrier.create(2))
    except OSError as error:
        return str(error)
    return ""


def _cuda() -> str:
    """From the file that `import torch` would run first; that takes two seconds."""
    spec = find_spec("torch")
    version = Path(str(spec.origin)).with_name("version.py") if spec else Path()
    found = re.search(r"^cuda\b.*= '(.+)'$", _read(version), re.MULTILINE)
    return found[1] if found else ""


def _nearest(path: Path) -> Path:
    """The directory itself, or the first one above it that exists."""
    path = path.absolute()
    return next(one for one in (path, *path.parents) if one.is_dir())


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
