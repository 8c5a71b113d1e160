"""Checks of cores, memory and disk of one machine. Pure."""

from samestep.doctor.findings import Finding, judge
from samestep.doctor.observe import SHM, HostObservation


GB = 1_000_000_000
LEAST_MEMORY, LEAST_DISK, LEAST_FILES = GB, GB, 1024
DOCKERS_SHM = 64 << 20
"""Bytes of /dev/shm in a container that does not ask for more."""
MUCH_SWAP = 0.1
"""Share of the memory."""


def check(host: HostObservation) -> list[Finding]:
    """Run all checks of this module."""
    return [
        cores(host),
        processors(host),
        memory(host),
        swap(host),
        overcommit(host),
        shared_memory(host),
        shm(host),
        open_files(host),
        disk(host),
    ]


def cores(host: HostObservation) -> Finding:
    """Check how many workers `auto` starts, and that each has a core."""
    seen = f"{host.usable_cores} for workers ({host.usable_cores_because})"
    if host.cpu_quota is None or host.cpu_quota >= 1:
        return Finding("ok", "cores", seen)
    return Finding(
        "warning",
        "cores",
        f"a CPU quota of {host.cpu_quota:g} cores",
        "Even a single worker is paused in the middle of its steps, and others wait.",
        "docker update --cpus 1 CONTAINER",
    )


def processors(host: HostObservation) -> Finding:
    """Report logical processors and cores."""
    physical = host.physical_cores or host.logical_cpus
    seen = f"{host.logical_cpus} logical processors on {physical} cores"
    if host.allowed_cpus < host.logical_cpus:
        seen += f", {host.allowed_cpus} of them allowed"
    if host.logical_cpus > physical:
        seen += "; hyper-threads share a core's arithmetic, so auto counts cores"
    return Finding("ok", "processors", seen)


def memory(host: HostObservation) -> Finding:
    """Check that there is room for workers."""
    total, limit = host.memory_bytes, host.memory_limit_bytes
    limited = f", limited to {_gb(limit)}" if limit < total else ""
    return judge(
        "memory",
        host.available_bytes >= LEAST_MEMORY,
        f"{_gb(host.available_bytes)} available of {_gb(total)}{limited}",
        "Two workers on MNIST take 0.4 GB; the kernel kills what does not fit.",
        "ps aux --sort=-rss | head",
    )


def swap(host: HostObservation) -> Finding:
    """Check that the machine does not live on its swap."""
    return judge(
        "swap",
        host.swap_used_bytes <= MUCH_SWAP * host.memory_bytes,
        f"{_gb(host.swap_used_bytes)} in use",
        "A worker whose memory is on the disk makes all others wait.",
        "sudo swapoff -a && sudo swapon -a",
    )


def overcommit(host: HostObservation) -> Finding:
    """Check that processes may map more memory than they use, as torch does."""
    return judge(
        "overcommit",
        host.overcommit != 2,
        f"vm.overcommit_memory = {host.overcommit}",
        "Memory must be available when it is mapped. Workers are forked from a process "
        "that has imported torch, and map several times the memory that they use: the "
        "fork may fail.",
        "sudo sysctl vm.overcommit_memory=0",
    )


def shared_memory(host: HostObservation) -> Finding:
    """Check that the exchange `shared` works."""
    return judge(
        "shared memory",
        not host.no_shared_memory,
        host.no_shared_memory or "anonymous memory and semaphores between processes",
        "Workers of this machine exchange over Gloo and TCP instead: the same bits, "
        "but slower.",
        "samestep train --exchange gloo",
    )


def shm(host: HostObservation) -> Finding:
    """Check that /dev/shm is large enough for a DataLoader."""
    size = host.shm_bytes
    return judge(
        str(SHM),
        size is None or size > DOCKERS_SHM,
        "none" if size is None else _gb(size),
        "samestep does not need it, but a PyTorch DataLoader with workers in your own "
        "code does: it would end with a bus error.",
        "docker run --shm-size=1g ...",
    )


def open_files(host: HostObservation) -> Finding:
    """Check that there is room for a connection to every worker."""
    return judge(
        "open files",
        host.open_files >= LEAST_FILES,
        f"at most {host.open_files:,}",
        "A worker over Gloo has a connection to every other one, besides its files.",
        "ulimit -n 4096",
    )


def disk(host: HostObservation) -> Finding:
    """Check that runs can be written."""
    if not host.out_is_writable:
        return Finding(
            "problem",
            "disk",
            f"{host.out} cannot be written",
            "Runs are directories below runs/ here, unless `--out` is given.",
            "samestep train --out DIRECTORY",
        )
    return judge(
        "disk",
        host.out_free_bytes >= LEAST_DISK,
        f"{_gb(host.out_free_bytes)} free in {host.out}",
        "A run keeps three checkpoints. A full disk costs them, but not the training.",
        "du -s runs/* | sort -n | tail",
    )


def _gb(size: int) -> str:
    return f"{size / GB:.2f} GB" if size < 10 * GB else f"{size / GB:,.0f} GB"
