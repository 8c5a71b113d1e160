"""What a caller asks for: a recipe, a placement, and objects for the workers."""

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from samestep.config.placement import RENAMED, Placement
from samestep.config.recipe import Recipe, parse_override
from samestep.config.renames import new_name
from samestep.errors import RecipeError, did_you_mean
from samestep.user_code import references
from samestep.user_code.references import NOTHING, Given


Part = str | Callable[..., Any] | object
"""`"module:function"`, a function or class, or what it would return."""

SECTIONS = {
    "model": ("family", "build"),
    "data": ("source", "load"),
    "loss": ("name", "function"),
}
RECIPE_OPTIONS = ("epochs", "global_batch", "micro_batches", "seed")
"""Fields of a recipe that have an option of their own."""
OWN_DEFAULTS: dict[str, Any] = {
    "name": "own",
    "epochs": 3,
    "global_batch": 64,
    "micro_batches": 8,
    "optimizer": {"name": "adam", "lr": 0.001},
}
"""A recipe for own code when none is named."""


def named(parts: Mapping[str, str | None]) -> dict[str, Any]:
    """`model`, `data`, `loss` -> sections of a recipe.

    Each is `module:function`, or a kind that is built in, such as `squared-error`.
    """
    sections = {}
    for part, name in parts.items():
        tag, key = SECTIONS[part]
        if name is not None:
            is_own = ":" in name
            sections[part] = {tag: "custom", key: name} if is_own else {tag: name}
    return sections


def recipe_of(
    base: Recipe | str | Path | None,
    parts: Mapping[str, str | None],
    fields: Mapping[str, Any],
) -> Recipe:
    """A recipe with own parts and other fields by their (dotted) names.

    Without a base: the default recipe, or with own parts, the defaults for these.
    Raises RecipeError.
    """
    sections = named(parts)
    if base is None and sections:
        base = Recipe.from_dict(OWN_DEFAULTS)
    if not isinstance(base, Recipe):
        return Recipe.load(base or "mnist-mlp", _kept({}, sections) | dict(fields))
    if not sections and not fields:
        return base
    return base.changed(_kept(base.to_dict(), sections) | dict(fields))


def requested(
    recipe: str | None, options: dict[str, Any]
) -> tuple[Recipe, dict[str, str]]:
    """The recipe and the own code of `samestep train`; takes its options out.

    Raises RecipeError.
    """
    fields = {name: options.pop(name) for name in RECIPE_OPTIONS}
    fields["data.skip_bad"] = options.pop("skip_bad") or None
    overrides = dict(map(parse_override, options.pop("assignments")))
    overrides |= {name: v for name, v in fields.items() if v is not None}
    named = {part: options.pop(part) for part in SECTIONS}
    parts = {part: name for part, name in named.items() if name is not None}
    return recipe_of(recipe, parts, overrides), parts


def _kept(before: Mapping[str, Any], sections: Mapping[str, Any]) -> dict[str, Any]:
    """A part that is named again keeps its arguments."""
    kept = {}
    for part, section in sections.items():
        tag = SECTIONS[part][0]
        old = before.get(part, {})
        kept[part] = {**old, **section} if old.get(tag) == section[tag] else section
    return kept


@contextmanager
def packed(parts: Mapping[str, Part | None]) -> Iterator[tuple[dict[str, str], Given]]:
    """Names for all parts, and the objects among them on their way to the workers.

    Raises OwnCodeError.
    """
    names = {part: each for part, each in parts.items() if isinstance(each, str)}
    objects = {
        part: each
        for part, each in parts.items()
        if each is not None and not isinstance(each, str)
    }
    if not objects:
        yield names, NOTHING
        return
    from samestep.user_code import transport

    parcels = {part: transport.pack(each, part) for part, each in objects.items()}
    names |= {part: parcel.name for part, parcel in parcels.items()}
    fd, index = transport.fill(list(parcels.values()))
    try:
        extents = {name: [list(each) for each in index[name]] for name in index}
        yield names, Given(extents, {"objects": fd})
    finally:
        os.close(fd)


def split_fields(fields: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Keywords -> fields of the recipe and fields of the placement. Raises RecipeError.

    `lr` is short for `optimizer.lr`; two underscores stand for a dot.
    """
    placed_names = Placement.model_fields.keys() | RENAMED
    placed = {k: v for k, v in fields.items() if k in placed_names}
    rest = {
        ("optimizer.lr" if k == "lr" else k.replace("__", ".")): v
        for k, v in fields.items()
        if k not in placed and v is not None
    }
    known = [*Recipe.model_fields, *Placement.model_fields, "lr"]
    for name in rest:
        if new_name(name).partition(".")[0] not in known:
            raise RecipeError(
                f"Neither a recipe nor a placement has a field `{name}`."
                f"{did_you_mean(name, known)}"
            )
    return rest, placed


def check_trusted(recipe: Recipe, names: Mapping[str, str]) -> None:
    """Before anything starts: is the code that the recipe names there, and trusted?"""
    references.check_origin(references.names(recipe), names, set(names.values()))
