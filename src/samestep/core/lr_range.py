"""The learning-rate range test (Smith 2017, arXiv:1506.01186).

The learning rate grows from step to step by one factor, from very small to too large.
The loss is smoothed by an exponential mean whose bias is corrected. The suggestion is
the rate where the smoothed loss falls fastest over the logarithm of the rate, as in
fastai and Lightning.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from samestep.core.lr_schedule import power


SMOOTHING = 0.98
"""Weight of the mean so far beside the next loss."""
DIVERGED = 4.0
"""The test ends once the smoothed loss is this many times the lowest one."""
SKIPPED_FIRST, SKIPPED_LAST = 10, 1
"""Points at the beginning and at the end that are never suggested."""


@dataclass(frozen=True)
class LrRange:
    """The learning rates of a range test."""

    start: float
    factor: float
    """Factor from step to step."""
    steps: int

    @classmethod
    def between(cls, start: float, end: float, steps: int) -> "LrRange":
        """Return a range of `steps` rates, at least 2, from `start` to about `end`."""
        return cls(start, (end / start) ** (1 / (steps - 1)), steps)

    @classmethod
    def of(cls, fields: Sequence[float]) -> "LrRange | None":
        """Return the range of a job's fields; None if there are none."""
        if not fields:
            return None
        start, factor, steps = fields
        return cls(start, factor, int(steps))

    def rate(self, step: int) -> float:
        """Return the rate of a step, counted from 0; the last one from the end on."""
        return self.start * power(self.factor, min(step, self.steps - 1))


def smoothed(losses: Sequence[float]) -> list[float]:
    """Return the exponential mean at each step, bias corrected."""
    mean, weight, result = 0.0, 1.0, []
    for loss in losses:
        mean = SMOOTHING * mean + (1 - SMOOTHING) * loss
        weight *= SMOOTHING
        result.append(mean / (1 - weight))
    return result


def has_diverged(smooth: Sequence[float]) -> bool:
    """Return whether the last smoothed loss ends the test."""
    return smooth[-1] > DIVERGED * min(smooth)


def steepest(smooth: Sequence[float]) -> int | None:
    """Return the index at which a smoothed loss falls fastest; None if it never does.

    Slopes are central differences, at the ends one-sided ones.
    """
    points = smooth[SKIPPED_FIRST : len(smooth) - SKIPPED_LAST]
    if len(points) < 2:
        return None
    last = len(points) - 1
    slopes = [
        (points[min(i + 1, last)] - points[max(i - 1, 0)])
        / (min(i + 1, last) - max(i - 1, 0))
        for i in range(len(points))
    ]
    least = min(slopes)
    return SKIPPED_FIRST + slopes.index(least) if least < 0 else None
