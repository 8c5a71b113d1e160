"""Which worker the others would be faster without.

It is measured over a while: trying such a worker again from time to time costs, too.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from samestep.core import ownership
from samestep.core.speeds import StepWindow


MIN_GAIN = 0.05
"""A straggler costs the others more than this share of the time."""
CONFIRMATIONS = 50
"""It does so in this many observations in a row."""
MEMORY = 10.0
"""Seconds after which what a worker cost the others counts 1 / e."""


@dataclass(frozen=True)
class Straggler:
    """A worker without which the others would be faster."""

    worker: int
    speed: float
    """Its speed as a share of the fastest worker's."""
    gain: float
    """The predicted share of the time that dropping it saves."""


@dataclass
class StragglerDetector:
    """Compare what steps took with what the others alone would have needed."""

    micro_batches: int
    _spent: float = 0.0
    """Seconds of computing and updating, decaying."""
    _needed: float = 0.0
    """Seconds that the others would have needed without the slowest, decaying."""
    _confirmed: int = 0
    _reported: set[int] = field(default_factory=set)

    def observe(self, window: StepWindow, speeds: Sequence[float]) -> Straggler | None:
        """Return the straggler, if there is one; each worker is returned once."""
        if len(speeds) == 1:
            return None
        slowest = speeds.index(min(speeds))
        updates = [seconds / window.steps for seconds in window.updating]
        without = ownership.seconds_without(
            slowest, self.micro_batches, speeds, updates
        )
        spent = map(sum, zip(window.compute, window.updating, strict=True))
        # All workers wait for the one that computes and updates longest.
        decay = math.exp(-window.seconds / MEMORY)
        self._spent = decay * self._spent + max(spent)
        self._needed = decay * self._needed + window.steps * without
        gain = 1 - self._needed / self._spent
        self._confirmed = self._confirmed + 1 if gain > MIN_GAIN else 0
        if self._confirmed < CONFIRMATIONS or slowest in self._reported:
            return None
        self._reported.add(slowest)
        return Straggler(slowest, speeds[slowest] / max(speeds), gain)
