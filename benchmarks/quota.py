"""A limit on processes' CPU time, from outside: cgroup v1 or v2, needs root."""

import time
from pathlib import Path


PERIOD_US = 100_000
"""What containers use, too."""


class Quota:
    """A cgroup for a process; the full speed is `core` of a core."""

    def __init__(self, pid: int, core: float = 1.0, period_us: int = PERIOD_US) -> None:
        v1 = Path("/sys/fs/cgroup/cpu")
        self._is_v1 = v1.is_dir()
        root = v1 if self._is_v1 else Path("/sys/fs/cgroup")
        self._path = root / f"samestep-benchmark-{pid}"
        self._path.mkdir()
        self._core, self._period_us = core, period_us
        self.set(1.0)
        (self._path / "cgroup.procs").write_text(str(pid))

    @property
    def joined(self) -> list[str]:
        """The beginning of a command that shares this limit."""
        join = 'echo $$ > "$0" && exec "$@"'
        return ["sh", "-c", join, str(self._path / "cgroup.procs")]

    def set(self, speed: float) -> None:
        """1 is full speed."""
        share, period = speed * self._core, self._period_us
        quota = -1 if share >= 1 else int(share * period)
        if self._is_v1:
            (self._path / "cpu.cfs_period_us").write_text(str(period))
            (self._path / "cpu.cfs_quota_us").write_text(str(quota))
        else:
            limit = "max" if quota < 0 else str(quota)
            (self._path / "cpu.max").write_text(f"{limit} {period}")

    def close(self) -> None:
        """After the worker has ended."""
        end = time.monotonic() + 10
        while (self._path / "cgroup.procs").read_text() and time.monotonic() < end:
            time.sleep(0.01)
        self._path.rmdir()
