"""Shared memory without a name: it vanishes with its last user, however that ends."""

import errno
import mmap
import os
import tempfile

from samestep.errors import PlacementError
from samestep.system import machine


PAGE = 4096


def create(num_bytes: int = 0) -> int:
    """The descriptor of new memory, zeroed. Raises OSError.

    Linux: memfd, which the size of /dev/shm does not limit. Elsewhere: a temporary
    file that has lost its name.
    """
    if hasattr(os, "memfd_create"):
        fd = os.memfd_create("samestep")
    else:
        with tempfile.TemporaryFile(prefix="samestep-") as file:
            fd = os.dup(file.fileno())
    os.ftruncate(fd, num_bytes)
    return fd


def reserve(fd: int, num_bytes: int, purpose: str, remedy: str) -> mmap.mmap:
    """Makes the memory large enough and maps it. Raises PlacementError if it is short.

    What is short is found out here, not by SIGBUS in some later step.
    """
    try:
        missing = num_bytes - 512 * os.fstat(fd).st_blocks
        if missing > machine.available_memory():  # or the kernel would kill somebody
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
    """Rounded up to whole pages."""
    return -(-num_bytes // PAGE) * PAGE
