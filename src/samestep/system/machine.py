"""The cores and the memory that this process may really use, and what they are."""

import ctypes
import hashlib
import math
import os
import platform
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import psutil

from samestep.system.json_values import JsonObject


CGROUPS = Path("/sys/fs/cgroup")
MEMORY_FILES = (
    ("memory.max", "memory.current", "active_file", "inactive_file"),
    (
        "memory.limit_in_bytes",
        "memory.usage_in_bytes",
        "total_active_file",
        "total_inactive_file",
    ),
)
"""The files of cgroups v2 and v1 with the limit and the usage, and the fields of
memory.stat that are cache."""
CPUINFO = Path("/proc/cpuinfo")
LIBRARIES = ("samestep", "torch", "numpy", "safetensors", "pydantic")
THREAD_VARIABLES = (
    "OMP_NUM_THREADS",
    "MKL_NUM_THREADS",
    "OMP_PROC_BIND",
    "KMP_AFFINITY",
)

# From glibc's malloc.h.
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3


@dataclass(frozen=True)
class Gpus:
    """The GPUs that PyTorch can use; `samestep.models.device` looks for them."""

    names: tuple[str, ...] = ()
    """The name of each, with its compute capability."""
    software: str = ""
    """The versions of CUDA and cuDNN."""
    why: str = "PyTorch was not asked for GPUs"
    """The reason if there is none."""

    @property
    def title(self) -> str:
        """The properties that decide bits."""
        return f"{self.names[0]}, {self.software}"


def keep_freed_memory() -> None:
    """Let glibc reuse freed memory rather than return it to the kernel.

    Otherwise every step faults in the pages of its temporaries again. Other C libraries
    need no such call and have none.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(M_MMAP_THRESHOLD, 32 << 20)  # the largest that glibc takes
        mallopt(M_TRIM_THRESHOLD, 1 << 30)


def usable_cores() -> tuple[int, str]:
    """Return how many physical cores this process may use, and what limits them."""
    cpus = _affinity()
    cores, why = _physical_cores(cpus), "the physical cores of this machine"
    if len(cpus) < (os.cpu_count() or 1):
        why = "the physical cores in this process's affinity mask"
    quota = cpu_quota()
    if quota is not None and math.floor(quota) < cores:
        return max(1, math.floor(quota)), f"the CPU quota of {quota:g} cores"
    return cores, why


def cpu_quota() -> float | None:
    """Return the CPU quota of cgroups v1 or v2 in cores; None: unlimited."""
    quotas = []
    for directory in _cgroup_directories("cpu"):
        try:
            if (directory / "cpu.max").exists():
                quota, period = (directory / "cpu.max").read_text().split()
            else:
                quota = (directory / "cpu.cfs_quota_us").read_text().strip()
                period = (directory / "cpu.cfs_period_us").read_text().strip()
        except (OSError, ValueError):
            continue
        if quota not in ("max", "-1"):
            quotas.append(int(quota) / int(period))
    return min(quotas, default=None)


def memory_limit() -> int:
    """Return the bytes of the machine's memory, or of the smallest cgroup limit."""
    limits = [psutil.virtual_memory().total]
    for directory in _cgroup_directories("memory"):
        for name in ("memory.max", "memory.limit_in_bytes"):
            try:
                limits.append(int((directory / name).read_text()))
            except (OSError, ValueError):
                continue
    return min(limits)


def available_memory() -> int:
    """Return the bytes that can be allocated now without swapping.

    The limits of this process's cgroups count, less what is used there.
    """
    left = [memory_limit(), psutil.virtual_memory().available]
    for directory in _cgroup_directories("memory"):
        for limit, used, *reclaimable in MEMORY_FILES:
            try:
                most = int((directory / limit).read_text())
                usage = int((directory / used).read_text())
                stat = (directory / "memory.stat").read_text().split()
            except (OSError, ValueError):  # there is no limit, or another version
                continue
            counts = dict(zip(stat[::2], map(int, stat[1::2]), strict=True))
            # The kernel drops the cache of files before it kills a process; memory
            # of memfd_create is not in these counts.
            cache = sum(counts.get(name, 0) for name in reclaimable)
            left.append(max(0, most - usage + cache))
    return min(left)


def describe() -> JsonObject:
    """Return the part of environment.json that is known without torch."""
    cores, why = usable_cores()
    return {
        "machine": platform.machine(),
        "system": platform.platform(),
        "processor": processor_name(),
        "logical_cpus": os.cpu_count(),
        "physical_cores": psutil.cpu_count(logical=False),
        "affinity": sorted(_affinity()),
        "usable_cores": cores,
        "usable_cores_because": why,
        "cpu_quota": cpu_quota(),
        "caches": _caches(),
        "memory_bytes": psutil.virtual_memory().total,
        "memory_limit_bytes": memory_limit(),
        "python": platform.python_version(),
        "libraries": {name: metadata.version(name) for name in LIBRARIES},
        "thread_variables": {
            name: os.environ[name] for name in THREAD_VARIABLES if name in os.environ
        },
    }


def _affinity() -> set[int]:
    if hasattr(os, "sched_getaffinity"):
        return set(os.sched_getaffinity(0))
    return set(range(os.cpu_count() or 1))  # macOS has no affinity masks


def _physical_cores(cpus: set[int]) -> int:
    """Count the distinct cores: hyper-threads of one share its arithmetic units."""
    cores = set()
    for cpu in cpus:
        topology = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology")
        try:
            package = (topology / "physical_package_id").read_text().strip()
            cores.add((package, (topology / "core_id").read_text().strip()))
        except OSError:
            return min(len(cpus), psutil.cpu_count(logical=False) or len(cpus))
    return len(cores)


def _cgroup_directories(controller: str) -> Iterator[Path]:
    """Yield this process's cgroup and its ancestors, each of which may have a limit."""
    try:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, name = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        root = CGROUPS / controllers if controllers else CGROUPS
        path = root / name.lstrip("/")
        yield from (step for step in (path, *path.parents) if step.is_relative_to(root))


def _caches() -> dict[str, int]:
    """Return the bytes of each cache of the first CPU; empty if they are unknown."""
    sizes = {}
    directory = Path("/sys/devices/system/cpu/cpu0/cache")
    for cache in sorted(directory.glob("index*")):
        try:
            level, kind, size = (
                (cache / name).read_text().strip() for name in ("level", "type", "size")
            )
        except OSError:
            continue
        letter = {"Data": "d", "Instruction": "i"}.get(kind, "")
        sizes[f"L{level}{letter}"] = int(size.removesuffix("K")) * 1024
    return sizes


def processor_name() -> str:
    """Return the processor's model, or on arm64 its implementer and part numbers."""
    cpu = _cpuinfo()
    arm = [cpu[name] for name in ("CPU implementer", "CPU part") if name in cpu]
    return cpu.get("model name") or " ".join(arm) or platform.processor()


def cpu_features() -> frozenset[str]:
    """Return Linux's names of the instruction sets here; empty on other systems."""
    cpu = _cpuinfo()
    return frozenset((cpu.get("flags") or cpu.get("Features", "")).split())


def _cpuinfo() -> dict[str, str]:
    """Return the fields of the last CPU in /proc/cpuinfo; macOS has no such file."""
    try:
        lines = CPUINFO.read_text().splitlines()
    except OSError:
        return {}
    pairs = (line.partition(":")[::2] for line in lines)
    return {name.strip(): value.strip() for name, value in pairs}


def loopback() -> str:
    """Return the name of the loopback interface."""
    interfaces = {name for _, name in socket.if_nameindex()}
    return "lo" if "lo" in interfaces else "lo0"  # lo0: macOS


def name_of_process(pid: int) -> str:
    """Return a name that no other process has, on this machine or another."""
    return f"{socket.gethostname()} {pid} {psutil.Process(pid).create_time()}"


def checksum_of_sources() -> str:
    """Return the SHA-256 of samestep's Python files; it identifies edited ones, too."""
    root = Path(__file__).parents[1]
    digest = hashlib.sha256()
    for file in sorted(root.rglob("*.py")):
        digest.update(f"{file.relative_to(root)}\0".encode() + file.read_bytes())
    return digest.hexdigest()
