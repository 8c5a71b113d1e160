"""What is measured besides the loss, and how its cells are divided."""

from typing import NamedTuple

from samestep.config.data import Task


METRICS: dict[Task, str] = {
    "classification": "accuracy",
    "next-token": "accuracy",
    "regression": "absolute_error",
}
"""What is measured besides the loss: means over all targets."""


class Metric(NamedTuple):
    """What is measured besides the loss, in one cell or in two: a sum and a count."""

    name: str
    has_count: bool = False
    """Else it is a mean over all targets."""


COUNTED = Metric("loss", has_count=True)
"""Stands before all others where the loss is divided by a count of its own, such as
that of valid targets."""
MOST_METRICS = 64
"""Their sums are part of every snapshot."""


def all_metrics(own: tuple[Metric, ...], task: Task) -> tuple[Metric, ...]:
    """With the usual one, if there is no other.

    That is divided as the loss is, if not by the same number: by all targets, or by
    those that are valid.
    """
    if own in ((), (COUNTED,)):
        return (*own, Metric(METRICS[task], has_count=bool(own)))
    return own


def num_cells(own: tuple[Metric, ...]) -> int:
    """Of what a loss measures."""
    return sum(1 + m.has_count for m in all_metrics(own, "classification"))
