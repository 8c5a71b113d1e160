"""Shared memory between processes of one machine that have no common parent.

One creates anonymous memory, the others open it through /proc, and each notices at once
when another ends. Linux only.
"""

import contextlib
import errno
import os
import select
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple


BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


class Address(NamedTuple):
    """Where other processes find memory of this one; can be sent as JSON."""

    boot_id: str
    """That of the kernel: no other machine has it."""
    pid: int
    fd: int
    device: int
    inode: int

    @classmethod
    def of(cls, fd: int) -> "Address":
        """Return the address of the memory `fd` of this process. Raises OSError."""
        status = os.fstat(fd)
        boot_id = BOOT_ID.read_text().strip()
        return cls(boot_id, os.getpid(), fd, status.st_dev, status.st_ino)

    def open(self) -> int:
        """Return a descriptor of the memory, which must still be open there.

        Raises OSError, also where the address is that of something else: on another
        machine, or in a container whose processes have other numbers.
        """
        if BOOT_ID.read_text().strip() != self.boot_id:
            raise OSError("the memory is that of another machine")
        with contextlib.suppress(FileNotFoundError):
            fd = os.open(f"/proc/{self.pid}/fd/{self.fd}", os.O_RDWR)
            status = os.fstat(fd)
            if (status.st_dev, status.st_ino) == (self.device, self.inode):
                return fd
            os.close(fd)
        raise OSError("the memory is in another container")


class Peers:
    """The other workers of this machine."""

    def __init__(self, processes: Mapping[int, int]) -> None:
        """Watch the process of each rank. Raises OSError."""
        if not hasattr(os, "pidfd_open"):
            raise OSError(errno.ENOSYS, "Python cannot watch processes (pidfd) here")
        self._poll, self._ranks = select.poll(), dict[int, int]()
        for rank, process in processes.items():
            fd = os.pidfd_open(process)
            weakref.finalize(self, os.close, fd)
            self._poll.register(fd, select.POLLIN)
            self._ranks[fd] = rank

    def ended(self) -> list[int]:
        """Return the ranks whose processes have ended."""
        return sorted(self._ranks[fd] for fd, _ in self._poll.poll(0))
