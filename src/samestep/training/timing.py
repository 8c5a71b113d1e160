"""Where a step's time goes."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from samestep.core.span import Span


PHASES = (
    *("data", "forward", "backward", "exchange", "wait"),
    *("optimizer", "snapshot", "other"),
)
"""Seconds of a worker: `exchange` is moving and summing, `wait` is for later peers."""


@dataclass
class Times:
    """What some steps took."""

    seconds: Tensor
    """float64 [workers, phases]"""
    waited_for: Tensor
    """float64 [workers]: seconds that the others, on average, waited for this one."""
    bytes: int = 0
    """That workers read of each other's memory or received."""
    network_bytes: int = 0
    """The part of them that went from one node to another."""

    @classmethod
    def zero(cls, workers: int) -> "Times":
        """No steps."""
        return cls(
            torch.zeros(workers, len(PHASES), dtype=torch.float64),
            torch.zeros(workers, dtype=torch.float64),
        )

    def add(self, other: "Times") -> None:
        """More steps of the same workers."""
        self.seconds += other.seconds
        self.waited_for += other.waited_for
        self.bytes += other.bytes
        self.network_bytes += other.network_bytes

    def to_dict(self) -> dict[str, Any]:
        """The fields of a step's or an epoch's record."""
        of = by_phase(self.seconds.sum(dim=0))
        total = sum(of.values()) or 1.0
        return {
            "workers": [by_phase(row) for row in self.seconds],
            "waited_for": self.waited_for.tolist(),
            "communication_share": (of["exchange"] + of["wait"]) / total,
            "straggler_share": of["wait"] / total,
            "bytes_exchanged": self.bytes,
            "network_bytes": self.network_bytes,
        }


def by_phase(seconds: Tensor) -> dict[str, float]:
    """[phases] -> seconds by name."""
    return dict(zip(PHASES, seconds.tolist(), strict=True))


class Clock:
    """Charges the time since the last lap to a phase, for one clock read per lap."""

    def __init__(self) -> None:
        self.seconds = dict.fromkeys(PHASES, 0.0)
        self._last = time.perf_counter()
        self.taken = self._last
        """When `take` was last called."""

    def lap(self, phase: str) -> float:
        """Ends a phase and begins the next; returns the time, in seconds."""
        now = time.perf_counter()
        self.seconds[phase] += now - self._last
        self._last = now
        return now

    def begin(self, step: int) -> None:
        """A step begins; counted from 0, over all epochs."""

    def end(self) -> None:
        """The training ends."""

    def take(self) -> list[float]:
        """The seconds by phase since the last call, in the order of PHASES."""
        self.taken = self.lap("other")
        taken = [self.seconds[phase] for phase in PHASES]
        self.seconds = dict.fromkeys(PHASES, 0.0)
        return taken


class Tracer(Clock):
    """Also keeps every lap of some steps, and hands them over once."""

    WARM_UP = 10
    """Steps before the first one that is kept."""

    def __init__(
        self,
        steps: int,
        done: Callable[[list[Span]], None],
        finish: Callable[[], None] = lambda: None,
    ) -> None:
        """`finish` waits for what a lap has only queued, on a GPU."""
        super().__init__()
        self._steps, self._done, self._finish = steps, done, finish
        self._first, self._step = -1, -1
        self._spans: list[Span] = []

    def begin(self, step: int) -> None:
        """A step begins; counted from 0, over all epochs."""
        if self._first < 0:
            self._first = step + self.WARM_UP
        self._step = step
        if step == self._first + self._steps:
            self.end()

    def lap(self, phase: str) -> float:
        """Ends a phase and begins the next; returns the time, in seconds."""
        kept = 0 <= self._first <= self._step < self._first + self._steps
        if kept:
            self._finish()
        start = self._last
        now = super().lap(phase)
        if kept:
            self._spans.append(Span(self._step, phase, start, now - start))
        return now

    def end(self) -> None:
        """The training ends; perhaps before all steps were kept."""
        if self._spans:
            self._done(self._spans)
            self._spans = []
