"""The user's own learning-rate schedule, and the check that it is a pure function."""

import hashlib
import inspect
import math
from collections.abc import Callable
from typing import Any

from samestep.config.recipe import Recipe
from samestep.config.schedule import CustomLR
from samestep.core.lr_schedule import CustomFactor
from samestep.core.plan import Plan
from samestep.errors import OwnCodeError
from samestep.exchange import Merger, gather_cells
from samestep.user_code.references import UserCode, blaming, capital, title


MOST_COMPARED = 1_000
"""Steps whose factors are compared before the training."""


def load(recipe: Recipe, user_code: UserCode) -> CustomFactor | None:
    """Return the schedule of a recipe if it is the user's own.

    What is returned raises OwnCodeError unless the factor is finite and not negative.
    """
    if not isinstance(recipe.schedule, CustomLR):
        return None
    who = title(recipe.schedule.function, "schedule")
    function = user_code.find(recipe.schedule.function, "schedule")
    takes_total = _takes_two(function, who)

    def factor(step: int, total: int) -> float:
        with blaming(who):
            value = function(step, total) if takes_total else function(step)
            number = float(value)
        if math.isfinite(number) and number >= 0:
            return number
        raise OwnCodeError(
            "A schedule returns the factor of the learning rate, which is finite and "
            f"not negative; {who} returned {value!r} at step {step}."
        )

    return factor


def _takes_two(function: Any, who: str) -> bool:
    """Return whether a schedule takes the total as well. Raises OwnCodeError."""
    if not callable(function):
        raise OwnCodeError(f"{capital(who)} must be callable; received {function!r}.")
    for arguments in ((0, 1), (0,)):
        try:
            inspect.signature(function).bind(*arguments)
        except TypeError:
            continue
        except ValueError:  # of a library in C
            return False
        return len(arguments) == 2
    raise OwnCodeError(
        f"A schedule is a function of the step, or of the step and the number of all "
        f"steps; {who} takes other arguments."
    )


def check(
    factor: CustomFactor | None, recipe: Recipe, plan: Plan, rank: int, merger: Merger
) -> None:
    """All workers: check that a schedule is one function of the step, in all of them.

    Calls it twice for up to MOST_COMPARED steps. Raises OwnCodeError, on all workers.
    """
    if factor is None:
        return
    total = recipe.num_steps(plan.steps_per_epoch)
    length = total or MOST_COMPARED  # 0: a stream, whose length is not known
    steps = range(0, length, -(-length // MOST_COMPARED))
    first, second = _digest(factor, steps, total), _digest(factor, steps, total)
    every = gather_cells(merger, rank, [first, second])
    if len({cell for row in every for cell in row}) > 1:
        assert isinstance(recipe.schedule, CustomLR)
        raise OwnCodeError(
            "A schedule returns the same factor whenever and wherever it is called for "
            f"a step; {title(recipe.schedule.function, 'schedule')} does not. Let it "
            "depend on its arguments only."
        )


def _digest(factor: Callable[[int, int], float], steps: range, total: int) -> int:
    """Return 48 bits of a SHA-256 of the factors, which a float64 holds exactly."""
    text = " ".join(factor(step, total).hex() for step in steps)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:6], "big")
