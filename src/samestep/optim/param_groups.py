"""Parameter groups: which part of the flat vector is updated how.

Neighbours with equal settings are one stretch, so a recipe without groups has a single
one, the whole vector. Padding behind a parameter goes with it: it is zero and stays so.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from samestep.config.optimizer import MuonRecipe, OptimizerRecipe
from samestep.errors import RecipeError
from samestep.state.layout import Entry, Layout


MOST_NAMES = 40
NO_HIDDEN_MATRIX = re.compile("embed|position|head")


@dataclass(frozen=True)
class ParamGroup:
    """How parameters are updated."""

    weight_decay: float
    lr_factor: float = 1.0
    shape: tuple[int, ...] = ()
    """Of a matrix that is updated as a whole."""


@dataclass(frozen=True)
class Slice:
    """Elements `first` to `end` of a vector, which share a setting."""

    first: int
    end: int
    setting: ParamGroup


def stretches(
    recipe: OptimizerRecipe, layout: Layout, part: tuple[int, int]
) -> list[Slice]:
    """Of a part of the vector, relative to its beginning.

    Raises RecipeError if a group matches no parameter.
    """
    settings = _settings(recipe, layout)
    ends = [*layout.offsets[1:-1], layout.size]
    found: list[Slice] = []
    for first, end, setting in zip(layout.offsets, ends, settings, strict=False):
        first, end = max(first, part[0]) - part[0], min(end, part[1]) - part[0]
        if first >= end:
            continue
        if found and found[-1].setting == setting and not setting.shape:
            found[-1] = Slice(found[-1].first, end, setting)
        else:
            found.append(Slice(first, end, setting))
    return found


def _settings(recipe: OptimizerRecipe, layout: Layout) -> list[ParamGroup]:
    """Of each parameter."""
    names = [entry.name for entry in layout.parameters]
    found = {entry.name: _basic(recipe, layout, entry) for entry in layout.parameters}
    basic = dict(found)
    for group in reversed(recipe.groups or ()):
        for name in matching(group.match, names, "optimizer.groups"):
            before, decay = basic[name], group.weight_decay
            found[name] = ParamGroup(
                before.weight_decay if decay is None else decay,
                before.lr_factor * group.lr_factor,
                before.shape,
            )
    return list(found.values())


def _basic(recipe: OptimizerRecipe, layout: Layout, entry: Entry) -> ParamGroup:
    """Of a parameter that is in no group."""
    spared = not recipe.decay_norms_and_biases and len(entry.shape) <= 1
    decay = 0.0 if spared else recipe.weight_decay
    if not isinstance(recipe, MuonRecipe):
        return ParamGroup(decay)
    if entry.name in layout.whole:
        return ParamGroup(decay, shape=entry.shape)
    return ParamGroup(decay, recipe.adamw_lr / recipe.lr)


def wholes(
    recipe: OptimizerRecipe, shapes: Mapping[str, Sequence[int]]
) -> tuple[str, ...]:
    """The matrices that are updated as a whole, of parameters by name.

    By default those of two dimensions between the first and the last parameter of two
    or more, unless their name says that they are something else. Raises RecipeError.
    """
    if not isinstance(recipe, MuonRecipe):
        return ()
    if recipe.matrices is None:
        inner = [name for name, shape in shapes.items() if len(shape) > 1][1:-1]
        chosen = {name for name in inner if not NO_HIDDEN_MATRIX.search(name)}
    else:
        found = [matching(p, [*shapes], "optimizer.matrices") for p in recipe.matrices]
        chosen = {name for names in found for name in names}
    matrices = tuple(n for n in shapes if n in chosen and len(shapes[n]) == 2)
    if not matrices:
        raise RecipeError(
            "Muon is for matrices between the first and the last layer, and there is "
            f"none among {listing(shapes)}. Name some in `optimizer.matrices`, or use "
            "another optimizer."
        )
    return matrices


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
