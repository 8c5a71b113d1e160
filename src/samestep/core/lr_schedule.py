"""Learning-rate schedules: pure functions of the step, so a resume needs no state.

With `t` the step counted from 0, `T` the number of steps of the training and `e` the
steps of an epoch, the learning rate is `lr * warmup(t) * factor(t)`:

    warmup     min(1, (t + 1) / (warmup_epochs * e))
    constant   1
    step       factor ** floor(t / (every_epochs * e))
    linear     1 + (final - 1) * t / T
    polynomial final + (1 - final) * (1 - t / T) ** power
    cosine     final + (1 - final) * (1 + cos(pi * t / T)) / 2
    one-cycle  from `start` up to 1 along a cosine during the fraction `rise` of the
               steps, then down to `final` along a cosine (Smith and Topin 2018,
               arXiv:1708.07120; without the momentum cycle)
    cosine-restarts
               the cosine with the step and the length of the cycle for `t` and `T`:
               `every_epochs * e` steps, then `growth` times as many, and so on
               (Loshchilov and Hutter 2017, arXiv:1608.03983)
    plateau    1; `core.progress.Plateau` has the factor that evaluations decide
    custom     what a function of the user's returns

`math.cos` and `**` belong to the C library, whose last bit may differ from machine to
machine. Portable arithmetic has its own, which only add and multiply.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from samestep.config.recipe import Recipe
from samestep.config.schedule import (
    ConstantLR,
    CosineLR,
    CosineRestartsLR,
    CustomLR,
    LinearLR,
    OneCycleLR,
    PlateauLR,
    PolynomialLR,
    ScheduleRecipe,
    StepLR,
)


COSINE = [(-1) ** k / math.factorial(2 * k) for k in range(9)]
SINE = [(-1) ** k / math.factorial(2 * k + 1) for k in range(8)]
"""Taylor coefficients of cos(y) and sin(y) / y in powers of y^2."""


def cos_pi(x: float) -> float:
    """Return cos(pi x) for 0 <= x <= 1, the same on every machine.

    Within 2.3e-16 of the true value.
    """
    if x > 0.5:
        return -cos_pi(1 - x)
    if x > 0.25:
        y = math.pi * (0.5 - x)
        return y * _horner(SINE, y * y)
    y = math.pi * x
    return _horner(COSINE, y * y)


def power(base: float, exponent: int) -> float:
    """Return `base` to a power of at least 0 by repeated squaring."""
    result = 1.0
    for bit in f"{exponent:b}":
        result *= result
        if bit == "1":
            result *= base
    return result


def _horner(coefficients: Sequence[float], x: float) -> float:
    total = 0.0
    for coefficient in reversed(coefficients):
        total = total * x + coefficient
    return total


CustomFactor = Callable[[int, int], float]
"""Returns the factor of the learning rate, of a step counted from 0 and their total."""


@dataclass(frozen=True)
class Functions:
    """The functions that a schedule needs."""

    cos_pi: Callable[[float], float]
    power: Callable[[float, int], float]
    real_power: Callable[[float, float], float]
    custom: CustomFactor | None = None
    """The function that a recipe with a custom schedule names."""


LIBM = Functions(
    lambda x: math.cos(math.pi * x), lambda x, n: float(x**n), lambda x, y: float(x**y)
)
PORTABLE = Functions(cos_pi, power, lambda x, y: power(x, int(y)))


def learning_rate(
    schedule: ScheduleRecipe,
    lr: float,
    step: int,
    steps_per_epoch: int,
    total: int,
    functions: Functions = LIBM,
) -> float:
    """Return the learning rate of a step, counted from 0, of `total` steps."""
    warmup_steps = schedule.warmup_steps or schedule.warmup_epochs * steps_per_epoch
    warmup = min(1.0, (step + 1) / warmup_steps) if warmup_steps else 1.0
    return lr * warmup * _factor(schedule, step, steps_per_epoch, total, functions)


def rate_of(
    recipe: Recipe,
    step: int,
    steps_per_epoch: int,
    custom: CustomFactor | None = None,
) -> float:
    """Return the learning rate of a recipe's step, counted from 0 over all epochs."""
    functions = PORTABLE if recipe.is_portable else LIBM
    return learning_rate(
        recipe.schedule,
        recipe.optimizer.lr,
        step,
        steps_per_epoch,
        recipe.num_steps(steps_per_epoch),
        functions if custom is None else replace(functions, custom=custom),
    )


def _period(schedule: StepLR | CosineRestartsLR, steps_per_epoch: int) -> int:
    return schedule.every_steps or (schedule.every_epochs or 0) * steps_per_epoch


def _share_of_cycle(step: int, length: int, growth: int) -> float:
    """Return the share of its cycle that has passed before a step."""
    if growth == 1:
        return step % length / length
    while step >= length:
        step, length = step - length, length * growth
    return step / length


def _factor(
    schedule: ScheduleRecipe,
    step: int,
    steps_per_epoch: int,
    total: int,
    functions: Functions,
) -> float:
    def cosine(start: float, end: float, fraction: float) -> float:
        return end + (start - end) * (1 + functions.cos_pi(min(1.0, fraction))) / 2

    match schedule:
        case ConstantLR() | PlateauLR():
            return 1.0
        case CustomLR():
            assert functions.custom is not None
            return functions.custom(step, total)
        case StepLR(factor=factor):
            return functions.power(factor, step // _period(schedule, steps_per_epoch))
        case LinearLR(final=final):
            return 1 + (final - 1) * min(1.0, step / total)
        case PolynomialLR(power=exponent, final=final):
            left = max(0.0, 1 - step / total)
            return final + (1 - final) * functions.real_power(left, exponent)
        case CosineLR(final=final):
            return cosine(1.0, final, step / total)
        case CosineRestartsLR(growth=growth, final=final):
            first = _period(schedule, steps_per_epoch)
            return cosine(1.0, final, _share_of_cycle(step, first, growth))
        case OneCycleLR(start=start, rise=rise, final=final):
            top = rise * total
            if step < top:
                return cosine(start, 1.0, step / top)
            return cosine(1.0, final, (step - top) / max(1.0, total - 1 - top))
