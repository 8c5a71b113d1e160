"""A limit on processes' CPU time, from outside: cgroup v1 or v2, needs root.

A library of the benchmarks and the tests, not a script.
"""

import os
import time
from pathlib import Path


PERIOD_US = 100_000
"""What containers use, too."""
V1, V2 = Path("/sys/fs/cgroup/cpu"), Path("/sys/fs/cgroup")


class Quota:
    """A cgroup for a process; the full speed is `core` of a core."""

    def __init__(self, pid: int, core: float = 1.0, period_us: int = PERIOD_US) -> None:
        self._is_v1 = V1.is_dir()
        self._path = _root() / f"samestep-benchmark-{os.getpid()}-{pid}"
        self._path.mkdir()
        self._core, self._period_us = core, period_us
        self.set(1.0)
        (self._path / "cgroup.procs").write_text(str(pid))

    @property
    def joined(self) -> list[str]:
        """Return the beginning of a command that shares this limit."""
        join = 'echo $$ > "$0" && exec "$@"'
        return ["sh", "-c", join, str(self._path / "cgroup.procs")]

    def set(self, speed: float) -> None:
        """Set the speed; 1 is full speed."""
        share, period = speed * self._core, self._period_us
        quota = -1 if share >= 1 else int(share * period)
        if self._is_v1:
            (self._path / "cpu.cfs_period_us").write_text(str(period))
            (self._path / "cpu.cfs_quota_us").write_text(str(quota))
        else:
            limit = "max" if quota < 0 else str(quota)
            (self._path / "cpu.max").write_text(f"{limit} {period}")

    def close(self) -> None:
        """Remove the cgroup, after the worker has ended."""
        end = time.monotonic() + 10
        while (self._path / "cgroup.procs").read_text() and time.monotonic() < end:
            time.sleep(0.01)
        self._path.rmdir()


def remove_all() -> None:
    """Remove every cgroup of this process; none of their processes may live."""
    for path in _root().glob(f"samestep-benchmark-{os.getpid()}-*"):
        path.rmdir()


def _root() -> Path:
    return V1 if V1.is_dir() else V2
