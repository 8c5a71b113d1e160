"""Checks that two machines are alike enough to train together. Pure."""

from samestep.doctor.findings import Finding, judge
from samestep.doctor.observe import HostObservation
from samestep.system.conditions import NONE, VARIABLES, described


HAVE_OWN_CHECK = ("samestep", "torch")


def compare(own: HostObservation, peer: HostObservation) -> list[Finding]:
    """Run all checks of this module."""
    return [
        _names(own, peer),
        _sources(own, peer),
        _torch(own, peer),
        _kernels(own, peer),
        _libraries(own, peer),
        _cores(own, peer),
    ]


def _names(own: HostObservation, peer: HostObservation) -> Finding:
    same = own.host == peer.host
    return judge(
        "hosts",
        not same,
        f"both are called {own.host}" if same else f"{own.host} and {peer.host}",
        "Messages name hosts, and each keeps its state in a directory of its name: on "
        "a shared file system they would overwrite each other.",
        "sudo hostnamectl set-hostname NAME",
    )


def _sources(own: HostObservation, peer: HostObservation) -> Finding:
    version, theirs = (host.libraries.get("samestep", "?") for host in (own, peer))
    same = own.sources_sha256 == peer.sources_sha256
    ours = f"{version} ({own.sources_sha256[:12]})"
    theirs = f"{theirs} ({peer.sources_sha256[:12]})"
    return judge(
        "samestep on both",
        same,
        f"{version}, the same sources" if same else _by_host(own, peer, ours, theirs),
        "Other code may compute other bits: a training on both does not start.",
        f"pip install --force-reinstall --no-deps samestep=={version}",
        "problem",
    )


def _torch(own: HostObservation, peer: HostObservation) -> Finding:
    ours, theirs = (host.libraries.get("torch", "?") for host in (own, peer))
    return judge(
        "PyTorch on both",
        ours == theirs,
        ours if ours == theirs else _by_host(own, peer, ours, theirs),
        "Another build has other kernels, and so other bits: a training on both does "
        "not start.",
        f"pip install torch=={ours}",
        "problem",
    )


def _kernels(own: HostObservation, peer: HostObservation) -> Finding:
    """Compare what affects the bits besides the software."""
    ours, theirs = (
        (host.instruction_set or "no x86", host.processor, described(host.variables))
        for host in (own, peer)
    )
    if ours == theirs:
        shown = own.instruction_set or "this processor's own"
        return Finding("ok", "kernels on both", f"{shown}, {own.processor}")
    variables = {**own.variables, **peer.variables}
    if ours[0] != theirs[0]:
        mend = f"export ATEN_CPU_CAPABILITY={_lesser(ours[0], theirs[0])}"
    elif ours[2] != theirs[2]:
        mend = f"unset {' '.join(name for name in VARIABLES if name in variables)}"
    else:
        mend = "# train on machines of one type"
    shown_ours, shown_theirs = (
        ", ".join(part for part in parts if part != NONE) for parts in (ours, theirs)
    )
    return Finding(
        "problem",
        "kernels on both",
        _by_host(own, peer, shown_ours, shown_theirs),
        "Libraries choose kernels by instruction set, processor and these variables; "
        "other kernels round differently: a training on both does not start.",
        mend,
    )


def _libraries(own: HostObservation, peer: HostObservation) -> Finding:
    ours = {"Python": own.python, "libc": own.libc, **own.libraries}
    theirs = {"Python": peer.python, "libc": peer.libc, **peer.libraries}
    differing = [
        f"{name} ({_by_host(own, peer, ours.get(name, '-'), theirs.get(name, '-'))})"
        for name in {**ours, **theirs}
        if name not in HAVE_OWN_CHECK and ours.get(name) != theirs.get(name)
    ]
    starts = _runtime(own) == _runtime(peer)
    return judge(
        "libraries on both",
        not differing,
        "; ".join(differing) or ", ".join(map(" ".join, ours.items())),
        "Another version may prepare other data from the same files."
        if starts
        else "Another Python or libc may compute other bits: a training on both does "
        "not start.",
        "pip install --constraint constraints.txt samestep",
        "warning" if starts else "problem",
    )


def _runtime(host: HostObservation) -> tuple[str, str]:
    """Return what must agree; patch releases of Python may differ."""
    return host.python.rpartition(".")[0], host.libc


def _cores(own: HostObservation, peer: HostObservation) -> Finding:
    seen = _by_host(own, peer, str(own.usable_cores), str(peer.usable_cores))
    if own.usable_cores != peer.usable_cores:
        seen += "; micro-batches follow the workers' speeds"
    return Finding("ok", "cores on both", seen)


def _by_host(
    own: HostObservation, peer: HostObservation, ours: str, theirs: str
) -> str:
    there = peer.host if peer.host != own.host else "the peer"
    return f"{own.host}: {ours}; {there}: {theirs}"


def _lesser(ours: str, theirs: str) -> str:
    """Return the lesser of two instruction sets as PyTorch's variable spells it."""
    order = ["AVX512", "AVX2", "DEFAULT"]
    known = [name for name in (ours, theirs) if name in order]
    return max(known, key=order.index, default="DEFAULT").lower()
