"""Cores, memory and disk of one machine. Pure: facts in, findings out."""

from samestep.doctor.findings import Finding
from samestep.doctor.observe import SHM, HostObservation


GB = 1_000_000_000
LEAST_MEMORY, LEAST_DISK, LEAST_FILES = GB, GB, 1024
DOCKERS_SHM = 64 << 20
"""Bytes that a container has unless it asks for more."""
MUCH_SWAP = 0.1
"""Of the memory."""


def check(facts: HostObservation) -> list[Finding]:
    """All that is here."""
    checks = (
        cores,
        processors,
        memory,
        swap,
        overcommit,
        shared_memory,
        shm,
        open_files,
        disk,
    )
    return [one(facts) for one in checks]


def cores(facts: HostObservation) -> Finding:
    """How many workers does `auto` start, and do they run without being stopped?"""
    seen = f"{facts.usable_cores} for workers ({facts.usable_cores_because})"
    if facts.cpu_quota is None or facts.cpu_quota >= 1:
        return Finding("ok", "cores", seen)
    return Finding(
        "warning",
        "cores",
        f"a CPU quota of {facts.cpu_quota:g} cores",
        "Even one worker is stopped in the middle of its steps; others wait for it.",
        "docker update --cpus 1 CONTAINER",
    )


def processors(facts: HostObservation) -> Finding:
    """Are there more logical processors than cores?"""
    physical = facts.physical_cores or facts.logical_cpus
    seen = f"{facts.logical_cpus} logical processors on {physical} cores"
    if facts.allowed_cpus < facts.logical_cpus:
        seen += f", {facts.allowed_cpus} of them allowed"
    if facts.logical_cpus > physical:
        seen += "; hyper-threads share a core's arithmetic, so auto counts cores"
    return Finding("ok", "processors", seen)


def memory(facts: HostObservation) -> Finding:
    """Is there room for workers?"""
    total, limit = facts.memory_bytes, facts.memory_limit_bytes
    limited = f", limited to {_gb(limit)}" if limit < total else ""
    seen = f"{_gb(facts.available_bytes)} available of {_gb(total)}{limited}"
    if facts.available_bytes >= LEAST_MEMORY:
        return Finding("ok", "memory", seen)
    return Finding(
        "warning",
        "memory",
        seen,
        "Two workers on MNIST take 0.4 GB; what does not fit is killed by the kernel.",
        "ps aux --sort=-rss | head",
    )


def swap(facts: HostObservation) -> Finding:
    """Does the machine live on its swap?"""
    seen = f"{_gb(facts.swap_used_bytes)} in use"
    if facts.swap_used_bytes <= MUCH_SWAP * facts.memory_bytes:
        return Finding("ok", "swap", seen)
    return Finding(
        "warning",
        "swap",
        seen,
        "A worker whose memory is on the disk makes all others wait.",
        "sudo swapoff -a && sudo swapon -a",
    )


def overcommit(facts: HostObservation) -> Finding:
    """May processes map more memory than they use, as torch does?"""
    if facts.overcommit != 2:
        return Finding("ok", "overcommit", f"vm.overcommit_memory = {facts.overcommit}")
    return Finding(
        "warning",
        "overcommit",
        "vm.overcommit_memory = 2: memory must be there when it is mapped",
        "Workers are forked from a process that has imported torch and map several "
        "times the memory that they use: the fork may fail.",
        "sudo sysctl vm.overcommit_memory=0",
    )


def shared_memory(facts: HostObservation) -> Finding:
    """Does the exchange `shared` work here?"""
    if not facts.no_shared_memory:
        return Finding(
            "ok", "shared memory", "nameless memory and semaphores between processes"
        )
    return Finding(
        "warning",
        "shared memory",
        facts.no_shared_memory,
        "Workers of this machine exchange over Gloo and TCP instead: the same bits, "
        "but slower.",
        "samestep train --exchange gloo",
    )


def shm(facts: HostObservation) -> Finding:
    """Is /dev/shm large enough for those who use it?"""
    if facts.shm_bytes is None or facts.shm_bytes > DOCKERS_SHM:
        there = "none" if facts.shm_bytes is None else _gb(facts.shm_bytes)
        return Finding("ok", str(SHM), there)
    return Finding(
        "warning",
        str(SHM),
        _gb(facts.shm_bytes),
        "samestep does not need it, but a PyTorch DataLoader with workers in your own "
        "code does: it would end with a bus error.",
        "docker run --shm-size=1g ...",
    )


def open_files(facts: HostObservation) -> Finding:
    """Is there room for a connection to every worker?"""
    if facts.open_files >= LEAST_FILES:
        return Finding("ok", "open files", f"at most {facts.open_files:,}")
    return Finding(
        "warning",
        "open files",
        f"at most {facts.open_files:,}",
        "A worker over Gloo has a connection to every other one, besides its files.",
        "ulimit -n 4096",
    )


def disk(facts: HostObservation) -> Finding:
    """Can runs be written?"""
    seen = f"{_gb(facts.out_free_bytes)} free in {facts.out}"
    if not facts.out_is_writable:
        return Finding(
            "problem",
            "disk",
            f"{facts.out} cannot be written",
            "Runs are directories below runs/ here, unless `--out` says otherwise.",
            "samestep train --out DIRECTORY",
        )
    if facts.out_free_bytes >= LEAST_DISK:
        return Finding("ok", "disk", seen)
    return Finding(
        "warning",
        "disk",
        seen,
        "A run keeps three checkpoints. A disk that is full costs them, though not the "
        "training.",
        "du -s runs/* | sort -n | tail",
    )


def _gb(size: int) -> str:
    return f"{size / GB:.2f} GB" if size < 10 * GB else f"{size / GB:,.0f} GB"
