"""When all workers pause between two steps to compare notes.

Rank 0 decides and tells the others in the same merge that carries the losses, so that
all of them save and stop after the same step, over any exchange. Each machine has a
board of its own, so any worker may have been asked to stop; then all do.
"""

import time
from dataclasses import dataclass, field

from samestep.system.heartbeat import Heartbeat


SECONDS_BETWEEN = 0.2
"""At most so much work between two such points, unless one step takes longer."""
SNAPSHOT_SHARE = 0.01
"""At most so much of the time goes into snapshots, whatever the model's size..."""
MOST_RARE = 1_000
"""... but they are at most so many times as rare as asked for."""


@dataclass(frozen=True)
class Decision:
    """What a worker wants of all; that of rank 0 counts, and anybody's to stop."""

    stop: bool
    """Save and end."""
    save: bool
    """Save a snapshot."""
    steps: int
    """How many steps until the next such point."""
    leaving: int | None = None
    """The worker that is too slow to keep: all go on without it."""
    counts: tuple[int, ...] = ()
    """How many micro-batches each worker owns from now on; empty: as before."""

    def to_cells(self, workers: int) -> list[float]:
        """`num_cells(workers)` numbers that a merge can carry."""
        leaving = 0 if self.leaving is None else self.leaving + 1
        counts = self.counts or (0,) * workers
        return [*map(float, (self.stop, self.save, self.steps, leaving, *counts))]

    @classmethod
    def from_cells(cls, cells: list[float]) -> "Decision":
        """The inverse of `to_cells`."""
        stop, save, steps, leaving, *counts = map(int, cells)
        owned = tuple(counts) if any(counts) else ()
        return cls(
            bool(stop), bool(save), steps, leaving - 1 if leaving else None, owned
        )


STOP = 0


def num_cells(workers: int) -> int:
    """Of a decision."""
    return 4 + workers


@dataclass
class Cadence:
    """A worker's view of time, with snapshots every `snapshot_seconds`; 0: never."""

    heartbeat: Heartbeat
    snapshot_seconds: float
    _last_point: float = field(default_factory=time.monotonic)
    _last_save: float = field(default_factory=time.monotonic)
    _last_epoch: float = field(default_factory=time.monotonic)
    _cost: float = 0.0

    def decide(self, steps: int, epoch_ends: bool) -> Decision:
        """After `steps` more steps."""
        now = time.monotonic()
        per_step = (now - self._last_point) / steps
        self._last_point = now
        least = min(self._cost / SNAPSHOT_SHARE, MOST_RARE * self.snapshot_seconds)
        save = now - self._last_save >= max(self.snapshot_seconds, least)
        if epoch_ends and now - self._last_epoch >= least:  # but for very short epochs
            save, self._last_epoch = True, now
        save = save and self.snapshot_seconds > 0
        at_barrier = max(1, int(SECONDS_BETWEEN / max(per_step, 1e-9)))
        return Decision(self.heartbeat.stop, save, at_barrier)

    def saved(self, seconds: float) -> None:
        """A snapshot was saved and took so long."""
        self._last_save = self._last_point = time.monotonic()
        self._cost = seconds
