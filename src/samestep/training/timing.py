"""Where the time of a step goes: seconds of each worker by phase."""

import resource
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from samestep.messages.training import Span, TimeUse


PHASES = (
    "data",
    "forward",
    "backward",
    "exchange",
    "wait",
    "optimizer",
    "snapshot",
    "other",
)
"""Seconds of a worker: `exchange` is moving and summing, `wait` is for later peers."""


@dataclass
class Times:
    """The times of some steps, of all workers."""

    seconds: Tensor
    """float64 [workers, phases]"""
    waited_for: Tensor
    """float64 [workers]: seconds that the others, on average, waited for this one."""
    bytes: int = 0
    """Bytes that workers read from each other's memory or received."""
    network_bytes: int = 0
    """The part of `bytes` that went from one node to another."""

    @classmethod
    def zero(cls, workers: int) -> "Times":
        """Return the times of no steps."""
        return cls(
            torch.zeros(workers, len(PHASES), dtype=torch.float64),
            torch.zeros(workers, dtype=torch.float64),
        )

    def add(self, other: "Times") -> None:
        """Add the times of more steps of the same workers."""
        self.seconds += other.seconds
        self.waited_for += other.waited_for
        self.bytes += other.bytes
        self.network_bytes += other.network_bytes

    def take(self) -> "Times":
        """Return the times since the last call."""
        taken, zero = replace(self), Times.zero(len(self.seconds))
        self.seconds, self.waited_for = zero.seconds, zero.waited_for
        self.bytes = self.network_bytes = 0
        return taken

    def use(self) -> TimeUse:
        """Return what the records of steps and epochs have in common."""
        total = by_phase(self.seconds.sum(dim=0))
        seconds = sum(total.values()) or 1.0
        return TimeUse(
            workers=[by_phase(row) for row in self.seconds],
            waited_for=self.waited_for.tolist(),
            communication_share=(total["exchange"] + total["wait"]) / seconds,
            straggler_share=total["wait"] / seconds,
            bytes_exchanged=self.bytes,
            network_bytes=self.network_bytes,
        )


def by_phase(seconds: Tensor) -> dict[str, float]:
    """Name the seconds [phases] in the order of PHASES."""
    return dict(zip(PHASES, seconds.tolist(), strict=True))


def separate_waiting(seconds: Tensor, arrived: Tensor) -> Times:
    """Move the time until the last worker arrived from `exchange` to `wait`.

    `seconds` is float64 [workers, phases] and changes in place; `arrived` is float64
    [steps, workers], when each worker's gradients were ready.
    """
    exchange, wait = PHASES.index("exchange"), PHASES.index("wait")
    last, latest = arrived.max(dim=1, keepdim=True)
    waiting = last - arrived
    waited = waiting.sum(dim=0).minimum(seconds[:, exchange])
    seconds[:, exchange] -= waited
    seconds[:, wait] += waited
    others = max(1, arrived.shape[1] - 1)
    waited_for = torch.zeros(arrived.shape[1], dtype=torch.float64)
    waited_for.index_add_(0, latest.flatten(), waiting.sum(dim=1) / others)
    return Times(seconds, waited_for)


class Clock:
    """Charge the time since the last lap to a phase, for one clock read per lap."""

    def __init__(self) -> None:
        self.seconds = dict.fromkeys(PHASES, 0.0)
        self._last = time.perf_counter()
        self.taken = self._last
        """The time of the last call of `take`, in seconds."""

    def lap(self, phase: str) -> float:
        """End a phase and begin the next; return the time, in seconds."""
        now = time.perf_counter()
        self.seconds[phase] += now - self._last
        self._last = now
        return now

    def begin(self, step: int) -> None:
        """Begin a step; steps count from 0 over all epochs."""

    def end(self) -> None:
        """End the training."""

    def take(self) -> list[float]:
        """Return the seconds since the last call, in the order of PHASES."""
        self.taken = self.lap("other")
        taken = [self.seconds[phase] for phase in PHASES]
        self.seconds = dict.fromkeys(PHASES, 0.0)
        return taken


class Tracer(Clock):
    """A clock that also keeps every lap of some steps, and hands them over once."""

    WARM_UP = 10
    """Steps before the first one that is traced: caches are cold in these."""

    def __init__(
        self,
        steps: int,
        done: Callable[[list[Span]], None],
        finish: Callable[[], None] = lambda: None,
    ) -> None:
        """Trace `steps` steps, then pass the spans to `done`.

        `finish` waits for what a lap has only queued, on a GPU.
        """
        super().__init__()
        self._steps, self._done, self._finish = steps, done, finish
        self._first, self._step = -1, -1
        self._spans: list[Span] = []

    def begin(self, step: int) -> None:
        """Begin a step; steps count from 0 over all epochs."""
        if self._first < 0:
            self._first = step + self.WARM_UP
        self._step = step
        if step == self._first + self._steps:
            self.end()

    def lap(self, phase: str) -> float:
        """End a phase and begin the next; return the time, in seconds."""
        is_traced = 0 <= self._first <= self._step < self._first + self._steps
        if is_traced:
            self._finish()
        start = self._last
        now = super().lap(phase)
        if is_traced:
            self._spans.append(Span(self._step, phase, start, now - start))
        return now

    def end(self) -> None:
        """End the training, perhaps before all steps were traced."""
        if self._spans:
            self._done(self._spans)
            self._spans = []


def clock_for(
    steps: int, done: Callable[[list[Span]], None], finish: Callable[[], None]
) -> Clock:
    """Return a clock, one that traces if there are `steps` to trace."""
    return Tracer(steps, done, finish) if steps else Clock()


def minor_faults() -> int:
    """Return the page faults of this process that needed no I/O."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
