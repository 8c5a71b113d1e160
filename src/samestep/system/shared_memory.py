"""Shared memory without a name: the kernel frees it with its last user."""

import errno
import mmap
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager

from samestep.errors import PlacementError
from samestep.system import machine


PAGE = 4096


def create(num_bytes: int = 0) -> int:
    """Create zeroed memory; return its descriptor. Raises OSError.

    On Linux it is a memfd, which the size of /dev/shm does not limit, elsewhere an
    unlinked temporary file.
    """
    if hasattr(os, "memfd_create"):
        fd = os.memfd_create("samestep")
    else:
        with tempfile.TemporaryFile(prefix="samestep-") as file:
            fd = os.dup(file.fileno())
    os.ftruncate(fd, num_bytes)
    return fd


@contextmanager
def temporary(num_bytes: int = 0) -> Iterator[int]:
    """Create memory, and close its descriptor at the end."""
    fd = create(num_bytes)
    try:
        yield fd
    finally:
        os.close(fd)


def reserve(fd: int, num_bytes: int, purpose: str, remedy: str) -> mmap.mmap:
    """Enlarge the memory to `num_bytes` and map it.

    Raises PlacementError if the machine has less, instead of SIGBUS in a later step.
    """
    try:
        missing = num_bytes - 512 * os.fstat(fd).st_blocks
        if missing > machine.available_memory():  # else the kernel kills
            raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(fd, 0, num_bytes)
        else:  # macOS
            os.ftruncate(fd, num_bytes)
    except OSError as error:
        raise PlacementError(
            f"{purpose} needs {num_bytes / 1e6:,.0f} MB of shared memory on this "
            f"machine: {error.strerror}. {remedy}"
        ) from None
    return mmap.mmap(fd, num_bytes)


def pages(num_bytes: int) -> int:
    """Return the bytes of the whole pages that hold `num_bytes`."""
    return -(-num_bytes // PAGE) * PAGE
