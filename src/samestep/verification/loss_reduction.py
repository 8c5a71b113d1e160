"""Detect a loss function that takes the mean over its samples instead of the sum.

A sample is compared with a batch of that sample twice: a sum doubles, a mean stays,
even one that weighs samples by their class or by their valid targets. Two samples tell
a mean from a maximum or the like: their joint loss gives their weights, and the loss of
the first one twice and the second one once must follow from these.

All other losses are accepted: those that depend on the batch (contrastive), that draw
(dropout), that fail on one sample, and those that are zero or NaN on these samples.
"""

import copy
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal

from torch import Tensor


Rows = list[int]
Verdict = Literal["mean", "other", "alike", "unknown"]
"""`alike`: both samples have the same loss, and repeating one changes nothing."""
TOLERANCE = 1e-4
"""Relative: above the rounding of long float32 sums, far below what a sum changes."""


def has_rows(value: Any, size: int) -> bool:
    """Return whether all tensors in a value have one row for each sample of a batch."""
    if isinstance(value, Mapping):
        return all(has_rows(part, size) for part in value.values())
    if isinstance(value, tuple | list):
        return all(has_rows(part, size) for part in value)
    if isinstance(value, Tensor):
        return value.dim() > 0 and len(value) == size
    return value is None


def pick(value: Any, rows: Rows) -> Any:
    """Select rows of all tensors in a value, in tuples and dictionaries, too."""
    if isinstance(value, Mapping):
        # A copy keeps the type, such as a library's own kind of dictionary.
        selected: Any = copy.copy(value)
        for key, part in value.items():
            selected[key] = pick(part, rows)
        return selected
    if isinstance(value, tuple | list):
        parts = [pick(part, rows) for part in value]
        return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
    return value.detach()[rows] if isinstance(value, Tensor) else value


def judge(loss: Callable[[Rows], float]) -> Verdict:
    """Judge a loss from its values for rows 0 and 1, in any order and number."""
    first, second = loss([0]), loss([1])
    twice = loss([0, 0]), loss([1, 1])
    if not all(map(math.isfinite, (first, second, *twice))):
        return "unknown"
    if first == second == 0:
        return "unknown" if twice == (0, 0) else "other"
    if not (_is_close(twice[0], first) and _is_close(twice[1], second)):
        return "other"
    if _is_close(first, second):
        return "alike"
    both, uneven = loss([0, 1]), loss([0, 0, 1])
    if _is_close(both, first) or _is_close(both, second):
        return "other"
    # If it is a mean: the weight of the second sample, where the first one has 1.
    weight = (both - first) / (second - both)
    is_predicted = _is_close(uneven, (2 * first + weight * second) / (2 + weight))
    return "mean" if weight > 0 and is_predicted else "other"


def is_mean(losses: Iterable[Callable[[Rows], float]]) -> bool:
    """Return whether a loss is a mean: judge pairs of samples until one decides.

    If all losses are alike (a last layer of zeros), it is a mean.
    """
    seen: set[Verdict] = set()
    for loss in losses:
        verdict = _judged(loss)
        if verdict in ("mean", "other"):
            return verdict == "mean"
        seen.add(verdict)
    return "alike" in seen


def _judged(loss: Callable[[Rows], float]) -> Verdict:
    try:
        return judge(loss)
    except Exception:
        return "unknown"


def _is_close(one: float, other: float) -> bool:
    return math.isclose(one, other, rel_tol=TOLERANCE)
