"""Where the kernels can run: architectures, instruction sets, files of the library."""

import hashlib
import platform
from pathlib import Path
from typing import NamedTuple

from samestep.errors import KernelError, did_you_mean


SOURCES = Path(__file__).with_name("csrc")
_V2 = ("-mcx16", "-mpopcnt", "-msse3", "-mssse3", "-msse4.1", "-msse4.2")
_V3 = (*_V2, "-mavx2", "-mfma", "-mf16c", "-mbmi", "-mbmi2", "-mlzcnt", "-mmovbe")
_V4 = (*_V3, *(f"-mavx512{part}" for part in ("f", "bw", "cd", "dq", "vl")))
# Spelt out, since -march=x86-64-v3 has another name in each compiler.
ISAS: dict[str, dict[str, tuple[str, ...]]] = {
    "x86_64": {"v2": _V2, "v3": _V3, "v4": (*_V4, "-mprefer-vector-width=512")},
    "aarch64": {"neon": ()},
}
"""Architecture -> instruction set, the best last -> flags of the compiler."""


class Target(NamedTuple):
    """What a library is compiled for."""

    architecture: str
    system: str
    zig: str
    """What `zig cc -target` calls it: Linux with the glibc of manylinux_2_17."""
    wheel: str
    """The platform tag of a wheel."""


TARGETS = (
    Target("x86_64", "linux", "x86_64-linux-gnu.2.17", "manylinux_2_17_x86_64"),
    Target("aarch64", "linux", "aarch64-linux-gnu.2.17", "manylinux_2_17_aarch64"),
    Target("x86_64", "darwin", "x86_64-macos.11.0", "macosx_11_0_x86_64"),
    Target("aarch64", "darwin", "aarch64-macos.11.0", "macosx_11_0_arm64"),
    Target("x86_64", "windows", "x86_64-windows-gnu", "win_amd64"),
)
_ARCHITECTURES = {"amd64": "x86_64", "arm64": "aarch64"}
_NAMES = {"darwin": "libsamestep.dylib", "windows": "samestep.dll"}


def architecture() -> str:
    """Return this machine's, by the names of `ISAS` where it is one of them."""
    machine = platform.machine().lower()
    return _ARCHITECTURES.get(machine, machine)


def this_target() -> Target:
    """Return the target that is this machine; raise KernelError if none is."""
    here = (architecture(), platform.system().lower())
    for target in TARGETS:
        if (target.architecture, target.system) == here:
            return target
    kinds = ", ".join(f"{target.architecture} {target.system}" for target in TARGETS)
    raise KernelError(f"There are kernels for {kinds}, not for {' '.join(here)}.")


def target_of(wheel: str) -> Target:
    """Return the target with a wheel's platform tag; raise KernelError if none has."""
    for target in TARGETS:
        if target.wheel == wheel:
            return target
    tags = [target.wheel for target in TARGETS]
    raise KernelError(
        f"Wheels are made for {', '.join(tags)}, not for {wheel!r}."
        + did_you_mean(wheel, tags)
    )


def library_path(system: str | None = None) -> Path:
    """Return where the library lies, beside this file."""
    system = system or platform.system().lower()
    return Path(__file__).with_name(_NAMES.get(system, "libsamestep.so"))


def sources_digest() -> str:
    """Return the SHA-256 of all C sources: a library keeps that of its own."""
    digest = hashlib.sha256()
    for path in sorted(SOURCES.glob("*.[ch]")):
        digest.update(f"{path.name}\0".encode() + path.read_bytes() + b"\0")
    return digest.hexdigest()
