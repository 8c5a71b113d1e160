"""How fast each worker is: merged measurements in, believed speeds out.

A measured speed is that of what a worker owns now. Under a CPU quota, or beside another
process, a worker that owns little seems faster than one that owns more; so a worker is
believed to be faster than before only if it also waits for the others.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field


WINDOW = 5
"""Observations whose mean is a worker's measured speed."""
IDLE = 0.08
"""A worker that waits for less than this share of the time is busy."""
GROWTH, MAX_GROWTH = 2.0, 0.3
"""A worker that waits for the share `w` of the time is believed to become faster by at
most GROWTH * (w - IDLE) per second, and at most by MAX_GROWTH. A worker that owns
nothing is tried again in this way, too."""
MAX_FAILURES = 3
"""A worker's growth is halved each time that it got micro-batches and soon lost all of
them, at most this often: trying a hopeless worker costs more than it can bring."""


@dataclass(frozen=True)
class StepWindow:
    """What all workers measured in some steps; lists are by rank, in seconds."""

    steps: int
    seconds: float
    compute: Sequence[float]
    """All time from samples to gradients."""
    data: Sequence[float]
    """The part of `compute` that went into the samples."""
    waiting: Sequence[float]
    """Waiting for other workers; not part of `compute`."""
    updating: Sequence[float]
    """Updating the parameters, which workers without micro-batches do, too."""

    def followed_by(self, other: "StepWindow") -> "StepWindow":
        """Return the window of the steps of both."""
        return StepWindow(
            self.steps + other.steps,
            self.seconds + other.seconds,
            _added(self.compute, other.compute),
            _added(self.data, other.data),
            _added(self.waiting, other.waiting),
            _added(self.updating, other.updating),
        )


@dataclass
class WorkerSpeed:
    """The speed of one worker."""

    speed: float = 0.0
    """Micro-batches per second that it is believed to reach; 0: unknown."""
    data_share: float = 0.0
    """The share of its computing time that goes into drawing samples."""
    _observations: deque[tuple[float, float]] = field(
        default_factory=lambda: deque(maxlen=WINDOW)
    )
    """(micro-batches, seconds of computing them) of each observation."""
    _failures: int = 0

    @property
    def has_full_window(self) -> bool:
        """Whether the measured speed is the mean of a whole window."""
        return len(self._observations) == WINDOW

    def observe(self, window: StepWindow, rank: int, num_owned: int) -> None:
        """Update the speed of worker `rank`, which owned `num_owned` micro-batches."""
        compute = window.compute[rank]
        if num_owned > 0 and compute > 0:
            self._observations.append((window.steps * num_owned, compute))
            self.data_share = window.data[rank] / compute
        else:
            self._observations.clear()
        if self.has_full_window:
            self._failures = 0
        waiting = window.waiting[rank] / window.seconds
        self.speed = self._believed(waiting, window.seconds)

    def lose_all(self) -> None:
        """Record that the worker owns nothing from now on."""
        if 0 < len(self._observations) < WINDOW:
            self._failures += 1

    def _measured(self) -> float:
        """Return the lower of a long and a short mean; infinite if nothing is measured.

        The lower one, since being late costs all workers more than one of them idling.
        """
        observations = list(self._observations)
        means = [
            sum(amount for amount, _ in part) / sum(seconds for _, seconds in part)
            for part in (observations, observations[-2:])
            if part
        ]
        return min(means, default=float("inf"))

    def _believed(self, waiting: float, seconds: float) -> float:
        """Return the measured speed, but limit the growth of a worker that waits."""
        measured, before = self._measured(), self.speed
        if not before or (waiting < IDLE and measured < float("inf")):
            return measured
        growth = min(MAX_GROWTH, GROWTH * max(0.0, waiting - IDLE))
        growth /= 1 << min(self._failures, MAX_FAILURES)
        return min(measured, before * (1 + growth * seconds))


def _added(one: Sequence[float], other: Sequence[float]) -> list[float]:
    return [a + b for a, b in zip(one, other, strict=True)]
