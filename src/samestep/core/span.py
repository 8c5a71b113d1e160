"""A span of a worker's time, as a trace shows it."""

from typing import NamedTuple


class Span(NamedTuple):
    """A phase of a step; times in seconds on the monotonic clock of the machine."""

    step: int
    """Counted from 0 over all epochs."""
    phase: str
    start: float
    seconds: float
