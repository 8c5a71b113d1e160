"""Loads the library of kernels and chooses those of an instruction set.

`SAMESTEP_ISA` (`v2`, `v3`, `v4`, `neon`) forces one, for tests: the bits are the same.
"""

import ctypes
import os
from functools import cache
from pathlib import Path

from samestep.errors import KernelError, did_you_mean
from samestep.kernels.interface import INTERFACE, SPECIFICATION, Kernels
from samestep.kernels.targets import (
    ISAS,
    SOURCES,
    architecture,
    library_path,
    sources_digest,
)


VARIABLE = "SAMESTEP_ISA"
REMEDY = (
    "With a C compiler (Debian: apt install gcc libc6-dev) or `pip install ziglang`, "
    "run `python -m samestep.kernels.compiling`"
)


def load_kernels(isa: str | None = None) -> Kernels:
    """Return the kernels of an instruction set.

    By default it is that of `SAMESTEP_ISA`, else the best that this processor has.
    Takes a millisecond the first time. Raises KernelError if this installation has no
    library or one of another version, or if the processor cannot run the kernels.
    """
    return _choose(_open(library_path()), isa or os.environ.get(VARIABLE) or None)


def compiled_isas() -> list[str]:
    """Return the instruction sets in the library, the best first. Raises KernelError.

    This processor may not have all of them.
    """
    return _names(_open(library_path()))


def supported_isas() -> list[str]:
    """Return the instruction sets that can run here, the best first.

    Raises KernelError if the library cannot be used.
    """
    library = _open(library_path())
    names = _names(library)
    return [name for name in names if library.samestep_kernels(name.encode())]


@cache
def _open(path: Path) -> ctypes.CDLL:
    """Load a library and check that it belongs to this code. Raises KernelError."""
    if not path.exists():
        raise KernelError(_missing())
    try:
        library = ctypes.CDLL(str(path))
        _declare(library)
    except (OSError, AttributeError) as error:
        raise KernelError(
            f"The kernels of portable arithmetic cannot be loaded: {error}. {REMEDY}."
        ) from error
    _check_versions(library, path)
    return library


def _missing() -> str:
    if architecture() not in ISAS:
        return (
            f"Portable arithmetic has kernels for {' and '.join(ISAS)}, not for "
            f'{architecture()}: use `arithmetic = "torch"`.'
        )
    return (
        "Portable arithmetic needs its compiled kernels, and this installation has "
        "none: it was made from the sources on a machine without a C compiler. "
        f'{REMEDY}, or use `arithmetic = "torch"`.'
    )


def _declare(library: ctypes.CDLL) -> None:
    library.samestep_specification.restype = ctypes.c_int32
    library.samestep_interface.restype = ctypes.c_int32
    library.samestep_sources.restype = ctypes.c_char_p
    library.samestep_isas.restype = ctypes.POINTER(ctypes.c_char_p)
    library.samestep_kernels.restype = ctypes.POINTER(Kernels)
    library.samestep_kernels.argtypes = (ctypes.c_char_p,)


def _check_versions(library: ctypes.CDLL, path: Path) -> None:
    """Refuse a library of other versions, or of other sources than lie beside it."""
    has = (library.samestep_specification(), library.samestep_interface())
    needs = (SPECIFICATION, INTERFACE)
    if has != needs:
        raise KernelError(
            "The library of kernels must be of the same version as the Python code: "
            f"specification {needs[0]} and interface {needs[1]}, but {path} has "
            f"{has[0]} and {has[1]}. {REMEDY}."
        )
    if SOURCES.is_dir() and library.samestep_sources().decode() != sources_digest():
        raise KernelError(
            f"The library of kernels must be compiled from the sources in {SOURCES}, "
            f"but {path} is of others: they have changed since. {REMEDY}."
        )


@cache
def _choose(library: ctypes.CDLL, isa: str | None) -> Kernels:
    chosen = library.samestep_kernels(isa.encode() if isa else None)
    if not chosen:
        raise KernelError(_refusal(_names(library), isa))
    kernels: Kernels = chosen.contents
    return kernels


def _refusal(compiled: list[str], isa: str | None) -> str:
    if isa is None:
        return (
            f"Portable arithmetic needs one of the instruction sets "
            f"{', '.join(compiled)}, and this processor has none of them (x86-64-v2 is "
            'SSE4.2 and POPCNT, of 2009): use `arithmetic = "torch"`.'
        )
    known = [name for isas in ISAS.values() for name in isas]
    rule = f"{VARIABLE} must be one of {', '.join(known)}, not {isa!r}."
    if isa not in known:
        return rule + did_you_mean(isa.lower(), known)
    if isa not in compiled:
        return (
            f"{VARIABLE}={isa} is not an instruction set of {architecture()}, which "
            f"has {', '.join(compiled)}: unset it."
        )
    return (
        f"{VARIABLE}={isa} needs a processor with that instruction set, and this one "
        "lacks it: unset the variable to use the best that it has."
    )


def _names(library: ctypes.CDLL) -> list[str]:
    listed = library.samestep_isas()
    names: list[str] = []
    while name := listed[len(names)]:
        names.append(name.decode())
    return names
