"""Two machines that should train together: what must be, and is not, alike. Pure."""

from collections.abc import Sequence

from samestep.doctor.findings import Finding
from samestep.doctor.observe import HostObservation
from samestep.system.conditions import NONE, VARIABLES, described


NEED_NOT_AGREE = ("samestep", "torch")
"""Those of the libraries that have a finding of their own."""


def compare(own: HostObservation, peer: HostObservation) -> list[Finding]:
    """What both have, or what each has."""
    return [
        _names(own, peer),
        _sources(own, peer),
        _torch(own, peer),
        _kernels(own, peer),
        _libraries(own, peer),
        _cores(own, peer),
    ]


def _names(own: HostObservation, peer: HostObservation) -> Finding:
    if own.host != peer.host:
        return Finding("ok", "hosts", f"{own.host} and {peer.host}")
    return Finding(
        "warning",
        "hosts",
        f"both are called {own.host}",
        "What is listed by host cannot be told apart, nor the states that hosts keep "
        "in one directory of a shared file system.",
        "sudo hostnamectl set-hostname NAME",
    )


def _sources(own: HostObservation, peer: HostObservation) -> Finding:
    version = own.libraries.get("samestep", "?")
    if own.sources_sha256 == peer.sources_sha256:
        return Finding("ok", "samestep on both", f"{version}, the same sources")
    theirs = peer.libraries.get("samestep", "?")
    return Finding(
        "problem",
        "samestep on both",
        _by_host(
            own,
            peer,
            f"{version} ({own.sources_sha256[:12]})",
            f"{theirs} ({peer.sources_sha256[:12]})",
        ),
        "Other code may compute other bits: a training on both does not start.",
        f"pip install --force-reinstall --no-deps samestep=={version}",
    )


def _torch(own: HostObservation, peer: HostObservation) -> Finding:
    ours, theirs = (one.libraries.get("torch", "?") for one in (own, peer))
    if ours == theirs:
        return Finding("ok", "PyTorch on both", ours)
    return Finding(
        "problem",
        "PyTorch on both",
        _by_host(own, peer, ours, theirs),
        "Another build has other kernels, and so other bits: a training on both does "
        "not start.",
        f"pip install torch=={ours}",
    )


def _kernels(own: HostObservation, peer: HostObservation) -> Finding:
    """What decides bits besides the software."""
    ours, theirs = (
        (one.instruction_set or "no x86", one.processor, described(one.variables))
        for one in (own, peer)
    )
    if ours == theirs:
        shown = own.instruction_set or "this processor's own"
        return Finding("ok", "kernels on both", f"{shown}, {own.processor}")
    named = {**own.variables, **peer.variables}
    if ours[0] != theirs[0]:
        mend = f"export ATEN_CPU_CAPABILITY={_lesser(ours[0], theirs[0])}"
    elif ours[2] != theirs[2]:
        mend = f"unset {' '.join(name for name in VARIABLES if name in named)}"
    else:
        mend = "# train on machines of one type"
    return Finding(
        "problem",
        "kernels on both",
        _by_host(own, peer, _joined(ours), _joined(theirs)),
        "Other kernels round otherwise, and libraries choose them by the instructions, "
        "the processor and these variables: a training on both does not start.",
        mend,
    )


def _libraries(own: HostObservation, peer: HostObservation) -> Finding:
    ours = {"Python": own.python, "libc": own.libc, **own.libraries}
    theirs = {"Python": peer.python, "libc": peer.libc, **peer.libraries}
    differing = [
        f"{name} ({_by_host(own, peer, ours.get(name, '-'), theirs.get(name, '-'))})"
        for name in {**ours, **theirs}
        if name not in NEED_NOT_AGREE and ours.get(name) != theirs.get(name)
    ]
    if not differing:
        return Finding(
            "ok", "libraries on both", ", ".join(map(" ".join, ours.items()))
        )
    stops = _runtime(own) != _runtime(peer)
    return Finding(
        "problem" if stops else "warning",
        "libraries on both",
        "; ".join(differing),
        "Another Python or libc may compute other bits: a training on both does not "
        "start."
        if stops
        else "Data that are prepared by other versions can be other data.",
        "pip install --constraint constraints.txt samestep",
    )


def _runtime(one: HostObservation) -> tuple[str, str]:
    """Patch releases of Python may differ."""
    return one.python.rpartition(".")[0], one.libc


def _cores(own: HostObservation, peer: HostObservation) -> Finding:
    seen = _by_host(own, peer, str(own.usable_cores), str(peer.usable_cores))
    uneven = own.usable_cores != peer.usable_cores
    more = "; micro-batches follow the workers' speeds" if uneven else ""
    return Finding("ok", "cores on both", seen + more)


def _by_host(
    own: HostObservation, peer: HostObservation, ours: str, theirs: str
) -> str:
    there = peer.host if peer.host != own.host else "the peer"
    return f"{own.host}: {ours}; {there}: {theirs}"


def _joined(deciding: Sequence[str]) -> str:
    return ", ".join(one for one in deciding if one != NONE)


def _lesser(ours: str, theirs: str) -> str:
    """Of two names as PyTorch has them, in the lower case of its variable."""
    order = ["AVX512", "AVX2", "DEFAULT"]
    known = [name for name in (ours, theirs) if name in order]
    return max(known, key=order.index, default="DEFAULT").lower()
