"""The metrics besides the loss, and the cells in which they are summed."""

from typing import NamedTuple

from samestep.config.data import Task


METRICS: dict[Task, str] = {
    "classification": "accuracy",
    "next-token": "accuracy",
    "regression": "absolute_error",
}
"""The usual metric of each task: a mean over all targets."""


class Metric(NamedTuple):
    """A metric besides the loss, in one cell (a sum) or two (a sum and a count)."""

    name: str
    has_count: bool = False
    """Whether it is divided by its own count rather than by all targets."""


COUNTED = Metric("loss", has_count=True)
"""Comes first where the loss is divided by its own count, such as that of valid
targets."""
MOST_METRICS = 64
"""The limit; the sums of metrics are part of every snapshot."""


def all_metrics(own: tuple[Metric, ...], task: Task) -> tuple[Metric, ...]:
    """Return the user's metrics, and the usual one if they have none.

    The usual one is divided by all targets, or by the valid ones where the loss counts
    targets.
    """
    if own in ((), (COUNTED,)):
        return (*own, Metric(METRICS[task], has_count=bool(own)))
    return own


def num_cells(own: tuple[Metric, ...]) -> int:
    """Return the number of cells of all metrics."""
    return sum(1 + m.has_count for m in all_metrics(own, "classification"))
