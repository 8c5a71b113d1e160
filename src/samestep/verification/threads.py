"""How many threads a parallel region of torch really has: their number decides bits.

`torch.get_num_threads` tells what was asked for. OpenMP may give fewer: within
OMP_THREAD_LIMIT, as the machine's load allows with OMP_DYNAMIC, or one where regions
are not parallel at all (OMP_MAX_ACTIVE_LEVELS=0).
"""

import contextlib
import ctypes
import os
from pathlib import Path

import torch

from samestep.errors import PlacementError


LIMITING = ("OMP_THREAD_LIMIT", "OMP_DYNAMIC", "OMP_MAX_ACTIVE_LEVELS")
LIBRARY = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"


def check(wanted: int) -> None:
    """Raises PlacementError unless a parallel region has as many threads as `wanted`.

    Starts these threads, so it comes after what they inherit (flush-to-zero) is set,
    and after the last fork. Without GNU's or LLVM's OpenMP on Linux, torch is believed.
    """
    if wanted == 1 or not LIBRARY.exists():
        return
    with contextlib.suppress(AttributeError):  # torch was built without OpenMP
        openmp = ctypes.CDLL(str(LIBRARY))  # finds the OpenMP that torch has loaded
        found = _count(openmp)
        if found != wanted or openmp.omp_get_dynamic():
            raise PlacementError(_told(wanted, found))


def _count(openmp: ctypes.CDLL) -> int:
    """Every thread of a parallel region calls the function once."""
    calls: list[None] = []
    region = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(lambda _: calls.append(None))
    openmp.GOMP_parallel(region, None, 0, 0)
    return len(calls)


def _told(wanted: int, found: int) -> str:
    names = [name for name in LIMITING if name in os.environ]
    cause = f"{', '.join(names)} in the environment" if names else "OpenMP"
    mend = f"`unset {' '.join(names)}`, or ask for 1 thread" if names else "Ask for 1"
    return (
        "The number of threads decides bits, so a training has exactly as many as its "
        f"recipe says; `threads` is {wanted}, and {cause} allows {found} or fewer. "
        f"{mend} (`--set threads=1`; another recipe with other bits)."
    )
