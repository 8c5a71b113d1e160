"""Observes one machine, as far as it matters to trainings; without importing torch."""

import os
import re
import resource
import shutil
import socket
import sys
from collections.abc import Iterable, Set
from importlib import metadata
from importlib.util import find_spec
from ipaddress import ip_address
from pathlib import Path
from typing import Annotated, Literal

import psutil
from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from samestep.errors import PlacementError
from samestep.system import barrier, conditions, machine, network_interfaces
from samestep.system.json_values import JsonObject


RENDEZVOUS_PORT = 29400
"""Where torchrun's rendezvous listens by default."""
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
"""The environment variables that are observed; no others are."""
CPU_FLAGS = {
    "AVX512": {"avx512f", "avx512vl", "avx512bw", "avx512dq", "fma"},
    "AVX2": {"avx2", "fma"},
}
"""The processor flags that PyTorch requires for each set of kernels, best first."""
FOR_DEVELOPERS = ("dev", "benchmarks")
"""Extras that no training needs."""
MOST = 500
"""Characters of a text, and entries of a list, that a peer may send."""
HOSTS = Path("/etc/hosts")
OVERCOMMIT, SHM = Path("/proc/sys/vm/overcommit_memory"), Path("/dev/shm")  # noqa: S108


def printable(text: str) -> str:
    """Replace characters that would move the cursor of a terminal."""
    return "".join(one if one.isprintable() else "?" for one in text)


def _address(text: str) -> str:
    """Return an IP address. Raises ValueError if it is not one."""
    ip_address(text)
    return text


Text = Annotated[str, Field(max_length=MOST), AfterValidator(printable)]
Address = Annotated[Text, AfterValidator(_address)]
Size = Annotated[int, Field(ge=0, lt=1 << 64)]
"""A number of bytes or things."""
Texts = Annotated[tuple[Text, ...], Field(max_length=MOST)]


class HostObservation(BaseModel):
    """Facts about a machine; those of a peer come over the network and are checked."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    host: Text
    addresses: Annotated[tuple[tuple[Text, Address], ...], Field(max_length=MOST)]
    """(interface, address)"""
    down: Texts = ()
    """Interfaces that have an address and are switched off."""
    gloo_address: Address | Literal[""] = ""
    """Where Gloo would listen by default; empty if it could not."""
    gloo_why: Text = ""
    hosts_line: Text = ""
    """The line of /etc/hosts that gives the host's name a loopback address, if any."""
    busy_port: Size | None = None
    """The rendezvous' port, if it is in use on the address in question."""

    logical_cpus: Size
    allowed_cpus: Size
    """Processors in the affinity mask."""
    physical_cores: Size | None
    usable_cores: Size
    usable_cores_because: Text
    cpu_quota: float | None

    memory_limit_bytes: Size
    memory_bytes: Size
    available_bytes: Size
    swap_used_bytes: Size
    overcommit: int | None
    """vm.overcommit_memory; None if there is none."""
    shm_bytes: Size | None
    """The size of /dev/shm."""
    no_shared_memory: Text
    """Why the exchange `shared` does not work; empty if it does."""
    open_files: Size
    out: Text
    """Where runs are written."""
    out_free_bytes: Size
    out_is_writable: bool

    processor: Text
    instruction_set: Text
    gpus: Size
    """Number of devices of NVIDIA's driver."""
    python: Text
    libc: Text = ""
    cuda: Text
    """The CUDA version that PyTorch was built for; empty: a build for CPUs."""
    sources_sha256: Text
    """The checksum of samestep's own sources."""
    libraries: Annotated[dict[Text, Text], Field(max_length=100)]
    missing: Annotated[dict[Text, Texts], Field(max_length=100)]
    """Extra -> its packages that are not installed."""
    variables: Annotated[dict[Text, Text], Field(max_length=100)]

    def interface_of(self, address: str) -> str:
        """Return the name of the interface with this address, or an empty string."""
        return next((name for name, one in self.addresses if one == address), "")


def observe(address: str = "", port: int = RENDEZVOUS_PORT) -> HostObservation:
    """Observe this machine; try whether `port` is free on `address` ("": on all)."""
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
            "instruction_set": instruction_set(machine.cpu_features()),
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


def instruction_set(features: Set[str]) -> str:
    """Return the name of PyTorch's kernels for a processor with these features.

    It is that of `torch.backends.cpu.get_cpu_capability` on x86, unless
    ATEN_CPU_CAPABILITY asks for less, and empty on other processors.
    """
    if "sse2" not in features:  # which every x86-64 has
        return ""
    return next(
        (kind for kind, need in CPU_FLAGS.items() if need <= features), "DEFAULT"
    )


def trapping_line(hosts: str, host: str) -> str:
    """Return the first line of /etc/hosts on `host`, if it has a loopback address."""
    for line in hosts.splitlines():
        address, *names = line.partition("#")[0].split() or [""]
        if host in names:
            return line.strip() if address.startswith(("127.", "::1")) else ""
    return ""


def missing_packages(requirements: Iterable[str]) -> dict[str, list[str]]:
    """Return what is not installed of each extra, for lines `x>=1; extra == 'a'`."""
    missing: dict[str, list[str]] = {}
    for line in requirements:
        match = re.match(r"([\w.-]+).*;\s*extra\s*==\s*['\"](\w+)['\"]", line)
        if match and match[2] not in FOR_DEVELOPERS and not _is_installed(match[1]):
            missing.setdefault(match[2], []).append(match[1])
    return missing


def _is_installed(package: str) -> bool:
    try:
        metadata.version(package)
    except metadata.PackageNotFoundError:
        return False
    return True


def _network(address: str, port: int) -> JsonObject:
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


def _memory() -> JsonObject:
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
    # Read from a file, as `import torch` takes two seconds.
    spec = find_spec("torch")
    version = Path(str(spec.origin)).with_name("version.py") if spec else Path()
    match = re.search(r"^cuda\b.*= '(.+)'$", _read(version), re.MULTILINE)
    return match[1] if match else ""


def _nearest(path: Path) -> Path:
    """Return the directory itself, or the first one above it that exists."""
    path = path.absolute()
    return next(one for one in (path, *path.parents) if one.is_dir())


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
