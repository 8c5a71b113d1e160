"""Which workers make no progress, and where they are."""

import contextlib
import signal
import time
from dataclasses import dataclass, field
from pathlib import Path

from samestep.board import ROUNDS, Board
from samestep.forking import START_SECONDS, ForkServer


PATIENCE = 5
"""A worker may take so many times the longest pause seen so far."""
STACK_SECONDS = 1.0
"""Deadline for a worker to write its stacks into its log."""
STACK_BYTES = 20_000


@dataclass
class Watch:
    """Looks at the board; a slow worker moves it, one that hangs does not."""

    board: Board
    timeout_seconds: float
    _last: list[tuple[int, int, int]] = field(default_factory=list)
    _since: float = field(default_factory=time.monotonic)
    _longest: float = 0.0

    @property
    def patience(self) -> float:
        """Seconds without any change on the board that are too many."""
        if not any(map(any, self._last)):  # workers are still starting
            return max(self.timeout_seconds, START_SECONDS)
        return max(self.timeout_seconds, PATIENCE * self._longest)

    def late(self) -> list[int]:
        """The ranks that hang: those that reached the fewest exchanges."""
        now, cells = time.monotonic(), self.board.workers()
        if cells != self._last:
            if any(map(any, self._last)):
                self._longest = max(self._longest, now - self._since)
            self._last, self._since = cells, now
        if now - self._since < self.patience:
            return []
        fewest = min(cell[ROUNDS] for cell in cells)
        return [rank for rank, cell in enumerate(cells) if cell[ROUNDS] == fewest]


def where_it_hangs(server: ForkServer, pid: int, log: Path) -> str:
    """The stacks of a worker's threads, which it writes into its log on request."""
    if is_stopped(pid):
        return ""
    size = log.stat().st_size
    server.send_signal(pid, signal.SIGUSR2)
    end = time.monotonic() + STACK_SECONDS
    text = ""
    while time.monotonic() < end:
        with log.open("rb") as file:
            file.seek(size)
            grown = file.read(STACK_BYTES).decode(errors="replace")
        if grown and grown == text:
            break
        text = grown
        time.sleep(0.05)
    return text


def is_stopped(pid: int) -> bool:
    """By SIGSTOP or a debugger; unknown counts as no."""
    with contextlib.suppress(OSError):
        status = Path(f"/proc/{pid}/stat").read_text()
        return status.rpartition(")")[2].split()[0] in ("T", "t")
    return False
