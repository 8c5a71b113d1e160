"""How many threads a parallel region of torch really has: the number decides bits.

`torch.get_num_threads` returns what was asked for. OpenMP may give fewer: within
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


def check(expected: int) -> None:
    """Raise PlacementError unless a parallel region has `expected` threads.

    Starts these threads, so call it once flush-to-zero is set, which they inherit, and
    after the last fork. Without GNU's or LLVM's OpenMP on Linux, torch is trusted.
    """
    if expected == 1 or not LIBRARY.exists():
        return
    with contextlib.suppress(AttributeError):  # torch was built without OpenMP
        openmp = ctypes.CDLL(str(LIBRARY))  # finds the OpenMP that torch has loaded
        num_threads = _count(openmp)
        if num_threads != expected or openmp.omp_get_dynamic():
            raise PlacementError(_message(expected, num_threads))


def _count(openmp: ctypes.CDLL) -> int:
    """Count the threads of a parallel region: each calls the function once."""
    calls: list[None] = []
    region = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(lambda _: calls.append(None))
    openmp.GOMP_parallel(region, None, 0, 0)
    return len(calls)


def _message(expected: int, num_threads: int) -> str:
    names = [name for name in LIMITING if name in os.environ]
    cause = f"{', '.join(names)} in the environment" if names else "OpenMP"
    remedy = f"`unset {' '.join(names)}`, or ask for 1 thread" if names else "Ask for 1"
    # OMP_DYNAMIC allows fewer at any time, even if the count is right now.
    allowed = str(num_threads) if num_threads != expected else "fewer under load"
    return (
        "The number of threads decides bits, so a training needs exactly as many as "
        f"its recipe says; `threads` is {expected}, and {cause} allows {allowed}. "
        f"{remedy} (`--set threads=1`; another recipe with other bits)."
    )
