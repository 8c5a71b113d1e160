"""Parameter groups: which part of the flat vector is updated how.

Neighbouring parameters of one group form one slice, so a recipe without groups has a
single one, the whole vector. Padding after a parameter belongs to the same slice: it is
zero and stays zero.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from samestep.config.optimizer import (
    AdafactorRecipe,
    LambRecipe,
    MuonRecipe,
    OptimizerRecipe,
)
from samestep.errors import RecipeError
from samestep.state.layout import Entry, Layout


MAX_NAMES = 40
NOT_HIDDEN = re.compile("embed|position|head")
"""Names of matrices that Muon is not meant for: embeddings and the last layer."""


@dataclass(frozen=True)
class ParamGroup:
    """How the parameters of a group are updated."""

    weight_decay: float
    lr_factor: float = 1.0
    shape: tuple[int, ...] | None = None
    """The shape of a parameter that is updated as a whole; None: elementwise."""


@dataclass(frozen=True)
class Slice:
    """The elements `[first, end)` of a vector, all in one group."""

    first: int
    end: int
    group: ParamGroup


def slices(
    recipe: OptimizerRecipe, layout: Layout, part: tuple[int, int]
) -> list[Slice]:
    """Divide the elements `part` of the vector by parameter group.

    The slices count from the beginning of `part`. Raises RecipeError if a group of the
    recipe matches no parameter.
    """
    every = groups(recipe, layout)
    ends = [*layout.offsets[1:-1], layout.size]
    result: list[Slice] = []
    for first, end, group in zip(layout.offsets, ends, every, strict=False):
        first, end = max(first, part[0]) - part[0], min(end, part[1]) - part[0]
        if first >= end:
            continue
        # Parameters that are updated as a whole are never joined.
        if result and result[-1].group == group and group.shape is None:
            result[-1] = Slice(result[-1].first, end, group)
        else:
            result.append(Slice(first, end, group))
    return result


def groups(recipe: OptimizerRecipe, layout: Layout) -> list[ParamGroup]:
    """Return the group of each parameter."""
    names = [entry.name for entry in layout.parameters]
    chosen = {entry.name: _basic(recipe, layout, entry) for entry in layout.parameters}
    basic = dict(chosen)
    # Reversed, since the first group that matches a name decides.
    for group in reversed(recipe.groups or ()):
        for name in matching(group.match, names, "optimizer.groups"):
            before, decay = basic[name], group.weight_decay
            chosen[name] = ParamGroup(
                before.weight_decay if decay is None else decay,
                before.lr_factor * group.lr_factor,
                before.shape,
            )
    return list(chosen.values())


def _basic(recipe: OptimizerRecipe, layout: Layout, entry: Entry) -> ParamGroup:
    """Return the group of a parameter that matches no group of the recipe."""
    is_spared = not recipe.decay_norms_and_biases and len(entry.shape) <= 1
    decay = 0.0 if is_spared else recipe.weight_decay
    shape = entry.shape if entry.name in layout.unsharded else None
    if isinstance(recipe, MuonRecipe) and shape is None:
        return ParamGroup(decay, recipe.adamw_lr / recipe.lr)
    return ParamGroup(decay, shape=shape)


def unsharded_names(
    recipe: OptimizerRecipe, shapes: Mapping[str, Sequence[int]]
) -> tuple[str, ...]:
    """Return the names of the parameters, among these shapes, that are never sliced.

    LAMB and Adafactor need norms or means of each parameter. Muon needs matrices: by
    default those between the first and the last parameter of two or more dimensions,
    except those whose names match `NOT_HIDDEN`. Raises RecipeError if it has none.
    """
    if isinstance(recipe, LambRecipe | AdafactorRecipe):
        return tuple(shapes)
    if not isinstance(recipe, MuonRecipe):
        return ()
    if recipe.matrices is None:
        inner = [name for name, shape in shapes.items() if len(shape) > 1][1:-1]
        chosen = {name for name in inner if not NOT_HIDDEN.search(name)}
    else:
        chosen = {
            name
            for pattern in recipe.matrices
            for name in matching(pattern, [*shapes], "optimizer.matrices")
        }
    matrices = tuple(n for n in shapes if n in chosen and len(shapes[n]) == 2)
    if not matrices:
        raise RecipeError(
            "Muon is for matrices between the first and the last layer, and there is "
            f"none among {listing(shapes)}. Name some in `optimizer.matrices`, or use "
            "another optimizer."
        )
    return matrices


def matching(pattern: str, names: Sequence[str], field: str) -> list[str]:
    """Return the names that contain a match of the regular expression `pattern`.

    Raises RecipeError, naming the recipe's `field`, if none does.
    """
    matches = [name for name in names if re.search(pattern, name)]
    if not matches:
        raise RecipeError(
            f"A regular expression in `{field}` must match the name of a parameter; "
            f"`{pattern}` matches none of {listing(names)}."
        )
    return matches


def listing(names: Iterable[str]) -> str:
    """Join names for a message, at most MAX_NAMES of them."""
    names = list(names)
    listed = ", ".join(names[:MAX_NAMES])
    hidden = len(names) - MAX_NAMES
    return f"{listed} and {hidden} more" if hidden > 0 else listed
