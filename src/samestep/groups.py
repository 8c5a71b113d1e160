"""Parameter groups: which part of the flat vector is updated how.

Neighbours with equal settings are one stretch, so a recipe without groups has a single
one, the whole vector. Padding behind a parameter goes with it: it is zero and stays so.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from samestep.errors import RecipeError
from samestep.layout import Layout
from samestep.optimizer_sections import OptimizerRecipe


MOST_NAMES = 40


@dataclass(frozen=True)
class Setting:
    """How parameters are updated."""

    weight_decay: float
    lr_factor: float = 1.0


@dataclass(frozen=True)
class Stretch:
    """Elements `first` to `end` of a vector, which share a setting."""

    first: int
    end: int
    setting: Setting


def stretches(
    recipe: OptimizerRecipe, layout: Layout, part: tuple[int, int]
) -> list[Stretch]:
    """Of a part of the vector, relative to its beginning.

    Raises RecipeError if a group matches no parameter.
    """
    settings = _settings(recipe, layout)
    ends = [*layout.offsets[1:-1], layout.size]
    found: list[Stretch] = []
    for first, end, setting in zip(layout.offsets, ends, settings, strict=False):
        first, end = max(first, part[0]) - part[0], min(end, part[1]) - part[0]
        if first >= end:
            continue
        if found and found[-1].setting == setting:
            found[-1] = Stretch(found[-1].first, end, setting)
        else:
            found.append(Stretch(first, end, setting))
    return found


def _settings(recipe: OptimizerRecipe, layout: Layout) -> list[Setting]:
    """Of each parameter."""
    names = [entry.name for entry in layout.parameters]
    found = {}
    for entry in layout.parameters:
        spared = not recipe.decay_norms_and_biases and len(entry.shape) <= 1
        found[entry.name] = Setting(0.0 if spared else recipe.weight_decay)
    for group in reversed(recipe.groups or ()):
        for name in matching(group.match, names, "optimizer.groups"):
            decay = group.weight_decay
            found[name] = Setting(
                found[name].weight_decay if decay is None else decay, group.lr_factor
            )
    return list(found.values())


def matching(pattern: str, names: Sequence[str], field: str) -> list[str]:
    """The names in which the regular expression is found. Raises RecipeError."""
    found = [name for name in names if re.search(pattern, name)]
    if not found:
        raise RecipeError(
            f"A regular expression in `{field}` must match the name of a parameter; "
            f"`{pattern}` matches none of {listing(names)}."
        )
    return found


def listing(names: Iterable[str]) -> str:
    """Names for a message, not too many."""
    names = list(names)
    more = f" and {len(names) - MOST_NAMES} more" * (len(names) > MOST_NAMES)
    return ", ".join(names[:MOST_NAMES]) + more
