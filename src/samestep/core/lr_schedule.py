"""Learning-rate schedules: pure functions of the step, so a resume needs no state.

With `t` the step counted from 0, `T` the number of steps of the training and `e` the
steps of an epoch, the learning rate is `lr * warmup(t) * factor(t)`:

    warmup     min(1, (t + 1) / (warmup_epochs * e))
    constant   1
    step       factor ** floor(t / (every_epochs * e))
    cosine     final + (1 - final) * (1 + cos(pi * t / T)) / 2
    one-cycle  from `start` up to 1 along a cosine during the fraction `rise` of the
               steps, then down to `final` along a cosine (Smith and Topin 2018,
               arXiv:1708.07120; without the momentum cycle)
"""

import math

from samestep.config.optimizer import (
    ConstantLR,
    CosineLR,
    OneCycleLR,
    ScheduleRecipe,
    StepLR,
)


def learning_rate(
    schedule: ScheduleRecipe, lr: float, step: int, steps_per_epoch: int, epochs: int
) -> float:
    """Return the learning rate of a step; `step` counts from 0 over all epochs."""
    warmup_steps = schedule.warmup_epochs * steps_per_epoch
    warmup = min(1.0, (step + 1) / warmup_steps) if warmup_steps else 1.0
    return lr * warmup * _factor(schedule, step, steps_per_epoch, epochs)


def _factor(
    schedule: ScheduleRecipe, step: int, steps_per_epoch: int, epochs: int
) -> float:
    total = epochs * steps_per_epoch
    match schedule:
        case ConstantLR():
            return 1.0
        case StepLR(every_epochs=every, factor=factor):
            return factor ** (step // (every * steps_per_epoch))
        case CosineLR(final=final):
            return _cosine(1.0, final, step / total)
        case OneCycleLR(start=start, rise=rise, final=final):
            top = rise * total
            if step < top:
                return _cosine(start, 1.0, step / top)
            return _cosine(1.0, final, (step - top) / max(1.0, total - 1 - top))


def _cosine(start: float, end: float, fraction: float) -> float:
    return end + (start - end) * (1 + math.cos(math.pi * min(1.0, fraction))) / 2
