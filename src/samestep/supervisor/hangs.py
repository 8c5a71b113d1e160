"""Find the workers that make no progress, and where they are."""

import contextlib
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from samestep.errors import WorkerLate
from samestep.messages.training import SlowStart
from samestep.supervisor.forkserver_client import ForkServer
from samestep.system.heartbeat import BEATS, PHASE, ROUNDS, Heartbeat


PATIENCE = 5
"""A worker may take this many times the longest pause seen so far."""
STACK_SECONDS = 1.0
"""Deadline for a worker to write its stacks into its log."""
STACK_BYTES = 20_000


@dataclass
class HangDetector:
    """Finds hanging workers by their heartbeats, which slow ones still change.

    Before their first step, workers load data, build and compile. Only their phase
    changes then, and each phase has a timeout of its own.
    """

    heartbeat: Heartbeat
    timeout_seconds: float
    start_seconds: float
    is_stopped: Callable[[int], bool]
    """Whether a signal has stopped the worker of a rank."""
    _cells: list[tuple[int, int, int, int]] = field(default_factory=list)
    _since: float = field(default_factory=time.monotonic)
    _longest: float = 0.0
    _last_slow_phase: int = -1
    """The last phase that was reported as slow."""

    @property
    def seconds(self) -> float:
        """Seconds since the heartbeat last changed."""
        return time.monotonic() - self._since

    @property
    def patience(self) -> float:
        """Seconds that the heartbeat may stay unchanged."""
        if self._is_starting:
            return self.start_seconds
        return max(self.timeout_seconds, PATIENCE * self._longest)

    @property
    def _is_starting(self) -> bool:
        return not all(cell[BEATS] or cell[ROUNDS] for cell in self._cells)

    def late(self) -> list[int]:
        """Return the ranks that hang: those that are furthest behind."""
        cells = self.heartbeat.workers()
        if cells != self._cells:
            if self._cells and not self._is_starting:
                self._longest = max(self._longest, self.seconds)
            self._cells, self._since = cells, time.monotonic()
        reached = [(cell[ROUNDS], cell[PHASE], cell[BEATS] > 0) for cell in cells]
        ranks = [rank for rank, far in enumerate(reached) if far == min(reached)]
        if self.seconds >= self.patience:
            return ranks
        # A start may take long, but a stopped process will not get any further.
        if self._is_starting and self.seconds >= self.timeout_seconds:
            return [rank for rank in ranks if self.is_stopped(rank)]
        return []

    def complaint(self, workers: str) -> str:
        """Return the error message for workers that are late.

        Equal failures have equal messages, unless a pause has raised `patience`:
        `RestartBudget` compares them.
        """
        if self._is_starting and self.seconds >= self.start_seconds:
            return (
                f"Each part of a start may take {self.start_seconds:g} s, and worker "
                f"{workers} has been {self.heartbeat.phase} for longer. It is stuck or "
                "very slow; if it is only slow, increase `--start-timeout`."
            )
        seconds = self.timeout_seconds if self._is_starting else self.patience
        late = WorkerLate.naming(
            f"worker {workers}",
            "Every worker must make progress",
            seconds,
            f"`--hang-timeout`, which is {self.timeout_seconds:g} s",
        )
        return str(late)

    def slow_start(self) -> SlowStart | None:
        """Return a message, once per phase that takes longer than a step may."""
        if not self._is_starting or self.seconds < self.timeout_seconds:
            return None
        phase = min(cell[PHASE] for cell in self._cells)
        if phase <= self._last_slow_phase:
            return None
        self._last_slow_phase = phase
        return SlowStart(
            phase=self.heartbeat.phase, waited=self.seconds, patience=self.patience
        )


def where_it_hangs(server: ForkServer, pid: int, log: Path) -> str:
    """Return the stacks of a worker's threads, which it writes into its log."""
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
        if grown and grown == text:  # nothing more has come since the last look
            break
        text = grown
        time.sleep(0.05)
    return text


def is_stopped(pid: int) -> bool:
    """Return whether SIGSTOP or a debugger has stopped a process.

    Return False where that cannot be known.
    """
    with contextlib.suppress(OSError):
        status = Path(f"/proc/{pid}/stat").read_text()
        return status.rpartition(")")[2].split()[0] in ("T", "t")
    return False
