"""Where a step's time goes."""

import time


PHASES = ("data", "forward", "backward", "exchange", "wait", "optimizer", "other")
"""Seconds of a worker: `exchange` is moving and summing, `wait` is for later peers."""


class Clock:
    """Charges the time since the last lap to a phase, for one clock read per lap."""

    def __init__(self) -> None:
        self.seconds = dict.fromkeys(PHASES, 0.0)
        self._last = time.perf_counter()

    def lap(self, phase: str) -> float:
        """Ends a phase and begins the next; returns the time, in seconds."""
        now = time.perf_counter()
        self.seconds[phase] += now - self._last
        self._last = now
        return now

    def take(self) -> list[float]:
        """The seconds by phase since the last call, in the order of PHASES."""
        self.lap("other")
        taken = [self.seconds[phase] for phase in PHASES]
        self.seconds = dict.fromkeys(PHASES, 0.0)
        return taken
