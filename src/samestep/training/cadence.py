"""When all workers synchronise between two steps, save a snapshot, or stop.

Rank 0 decides, and its decision travels with the merge of the losses, so all workers
save and stop after the same step, over any exchange. Only a stop may come from any
worker, since each machine has its own supervisor that may be asked to stop.
"""

import time
from dataclasses import dataclass, field

from samestep.system.heartbeat import Heartbeat


SECONDS_BETWEEN = 0.2
"""Work between two points of synchronisation, unless one step takes longer."""
SNAPSHOT_SHARE = 0.01
"""The share of the time that snapshots may take with a model of any size..."""
MAX_RARITY = 1_000
"""... but they become at most this many times as rare as asked for."""


@dataclass(frozen=True)
class Decision:
    """What all workers should do next, as one worker decides."""

    stop: bool
    """Whether to save and end."""
    save: bool
    """Whether to save a snapshot."""
    steps: int
    """Steps until the next point of synchronisation."""
    leaving: int | None = None
    """The worker that is too slow: all others go on without it."""
    counts: tuple[int, ...] = ()
    """Micro-batches that each worker owns from now on; empty: unchanged."""

    def to_cells(self, workers: int) -> list[float]:
        """Return `num_cells(workers)` numbers that a merge can carry."""
        leaving = 0 if self.leaving is None else self.leaving + 1
        counts = self.counts or (0,) * workers
        return [*map(float, (self.stop, self.save, self.steps, leaving, *counts))]

    @classmethod
    def from_cells(cls, cells: list[float]) -> "Decision":
        """Return the decision that `to_cells` was called on."""
        stop, save, steps, leaving, *counts = map(int, cells)
        owned = tuple(counts) if any(counts) else ()
        return cls(
            bool(stop), bool(save), steps, leaving - 1 if leaving else None, owned
        )


STOP = 0
"""The cell of `Decision.stop`."""


def num_cells(workers: int) -> int:
    """Return the number of cells of a decision."""
    return 4 + workers


@dataclass
class Cadence:
    """A worker's view of the time; snapshots every `snapshot_seconds`, 0: never."""

    heartbeat: Heartbeat
    snapshot_seconds: float
    checkpoint_steps: int | None = None
    """Save a snapshot for a checkpoint after each multiple of this number of steps."""
    every_step: bool = False
    """Whether all workers synchronise after every step, for callbacks."""
    _last_point: float = field(default_factory=lambda: time.monotonic())
    _last_save: float = field(default_factory=lambda: time.monotonic())
    _last_epoch: float = field(default_factory=lambda: time.monotonic())
    _cost: float = 0.0

    def decide(self, steps: int, epoch_ends: bool) -> Decision:
        """Decide after `steps` more steps."""
        now = time.monotonic()
        per_step = (now - self._last_point) / steps
        self._last_point = now
        # A snapshot that took long is followed by a longer pause.
        least = min(self._cost / SNAPSHOT_SHARE, MAX_RARITY * self.snapshot_seconds)
        save = now - self._last_save >= max(self.snapshot_seconds, least)
        if epoch_ends and now - self._last_epoch >= least:  # epochs may be very short
            save, self._last_epoch = True, now
        save = save and self.snapshot_seconds > 0
        next_steps = max(1, int(SECONDS_BETWEEN / max(per_step, 1e-9)))
        next_steps = 1 if self.every_step else next_steps
        return Decision(self.heartbeat.stop, save, next_steps)

    def is_due(self, step: int) -> bool:
        """Return whether a checkpoint is asked for after a step."""
        return self.checkpoint_steps is not None and step % self.checkpoint_steps == 0

    def saved(self, seconds: float) -> None:
        """Record that a snapshot was saved, and how long that took."""
        self._last_save = self._last_point = time.monotonic()
        self._cost = seconds
