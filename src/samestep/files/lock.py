"""A lock between processes: one writer for each run or scaling study."""

import fcntl
import os
import time
from pathlib import Path

from samestep.files import untrusted


POLL_SECONDS = 0.05


def acquire(path: Path, patience: float = 0.0) -> int | None:
    """Lock a file against other processes, and create it if necessary.

    Waits up to `patience` seconds for another holder. Returns a descriptor that holds
    the lock until it is closed or the process ends, or None if another process holds
    the lock. Raises OSError.
    """
    fd = untrusted.open_to_append(path, path.parent)
    end = time.monotonic() + patience
    while True:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return fd
        except BlockingIOError:
            if time.monotonic() >= end:
                os.close(fd)
                return None
            time.sleep(POLL_SECONDS)
        except OSError:  # some network file systems have no locks
            os.close(fd)
            raise
