"""One stretch of a worker's time, as a trace shows it."""

from typing import NamedTuple


class Span(NamedTuple):
    """Seconds on the machine's monotonic clock, which all its processes share."""

    step: int
    """Counted from 0, over all epochs."""
    phase: str
    start: float
    seconds: float
