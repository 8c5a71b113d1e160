"""Arguments of `samestep train` and `samestep.train`: from them a recipe is made.

Objects that a Python caller gives are packed for the workers.
"""

import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from samestep.config.placement import Placement
from samestep.config.recipe import Recipe, parse_override
from samestep.config.renames import PLACEMENT_NAMES, new_name, rename
from samestep.errors import PlacementError, RecipeError, did_you_mean
from samestep.user_code.references import NOTHING, Given


Part = str | Callable[..., Any] | object
"""`"module:function"`, a function or class, or the object that it would return."""

# The field that says `custom`, and the one that names the user's function.
SECTIONS = {
    "model": ("family", "build"),
    "data": ("source", "load"),
    "loss": ("name", "function"),
    "optimizer": ("name", "build"),
    "schedule": ("name", "function"),
}
RECIPE_OPTIONS = ("epochs", "max_steps", "global_batch", "micro_batches", "seed")
"""Fields of a recipe that have a command-line option, besides `--set`."""
USER_CODE_DEFAULTS: dict[str, Any] = {
    "name": "own",
    "epochs": 3,
    "global_batch": 64,
    "micro_batches": 8,
    "optimizer": {"name": "adam", "lr": 0.001},
}
"""The recipe of user code where none is named."""


KEPT = ("optimizer", "schedule")
"""Sections of which another kind keeps what means the same, such as `lr`."""


def _sections_of(parts: Mapping[str, str], before: Mapping[str, Any]) -> dict[str, Any]:
    """Return the sections of a recipe that `parts` name, or fields of those in KEPT.

    A name is `module:function`, or a built-in kind such as `squared-error`. What a
    section of the same kind had `before` is kept, such as arguments.
    """
    sections = dict[str, Any]()
    for part, name in parts.items():
        tag, key = SECTIONS[part]
        section = {tag: "custom", key: name} if ":" in name else {tag: name}
        old = before.get(part, {})
        if part in KEPT:
            sections |= {f"{part}.{field}": value for field, value in section.items()}
        elif old.get(tag) == section[tag]:
            sections[part] = {**old, **section}
        else:
            sections[part] = section
    return sections


def recipe_of(
    base: Recipe | str | Path | None,
    parts: Mapping[str, str],
    fields: Mapping[str, Any],
) -> Recipe:
    """Return a recipe with other parts, and with other fields by their dotted names.

    Without a base it is the default recipe, or that for user code if there are parts.
    Raises RecipeError.
    """
    if base is None and parts:
        base = Recipe.from_dict(USER_CODE_DEFAULTS)
    if not isinstance(base, Recipe):
        return Recipe.load(base or "mnist-mlp", _sections_of(parts, {}) | dict(fields))
    if not parts and not fields:
        return base
    return base.changed(_sections_of(parts, base.to_dict()) | dict(fields))


def placement_of(placement: Placement | None, fields: Mapping[str, Any]) -> Placement:
    """Return the placement with these fields. Raises PlacementError."""
    before = placement.model_dump() if placement else {}
    try:
        fields = rename(fields, PLACEMENT_NAMES, warn=True)
        return Placement.model_validate({**before, **fields})
    except RecipeError as error:  # a field under both names
        raise PlacementError(str(error)) from None
    except ValidationError as error:
        first = error.errors()[0]
        name, known = str(first["loc"][0]), list(Placement.model_fields)
        hint = "" if name in known else did_you_mean(name, known)
        raise PlacementError(
            f"`{name}`: {first['msg'][0].lower()}{first['msg'][1:]}; received "
            f"`{first['input']!r}`.{hint}"
        ) from None


def requested(
    recipe: str | None, options: dict[str, Any]
) -> tuple[Recipe, dict[str, Any]]:
    """Return the recipe of `samestep train`, and the parts that options have named.

    Removes these options from `options`; those of the placement are left. Raises
    RecipeError.
    """
    fields = {name: options.pop(name) for name in RECIPE_OPTIONS}
    fields["data.skip_bad"] = options.pop("skip_bad") or None
    overrides = dict(map(parse_override, options.pop("assignments")))
    overrides |= {name: v for name, v in fields.items() if v is not None}
    parts = parts_of(options)
    return recipe_of(recipe, parts, overrides), parts


def parts_of(options: dict[str, Any]) -> dict[str, Any]:
    """Return the parts that options have named, and remove these options."""
    given = {part: options.pop(part, None) for part in SECTIONS}
    return {part: name for part, name in given.items() if name is not None}


def split_parts(
    *parts: Part | None,
) -> tuple[dict[str, Part | None], dict[str, Any]]:
    """Divide parts, in the order of SECTIONS, in user code and sections of a recipe.

    An optimizer or a schedule that is a dictionary is a section.
    """
    named = dict(zip(SECTIONS, parts, strict=True))
    sections = {
        part: named.pop(part) for part in KEPT if isinstance(named[part], Mapping)
    }
    return named, sections


def numbered(callbacks: Iterable[Part]) -> dict[str, Part]:
    """Return callbacks by names that no part has, to be `packed` with the parts."""
    return {f"callback {i}": each for i, each in enumerate(callbacks, 1)}


def apart(names: dict[str, str]) -> tuple[dict[str, str], list[str]]:
    """Return the references of parts, and those of callbacks that were `numbered`."""
    parts = {part: name for part, name in names.items() if part in SECTIONS}
    return parts, [name for part, name in names.items() if part not in parts]


@contextmanager
def packed(parts: Mapping[str, Part | None]) -> Iterator[tuple[dict[str, str], Given]]:
    """Give all parts names, and pack the objects among them for the workers.

    The memory of the objects is released when the context ends. Raises OwnCodeError.
    """
    given = {part: each for part, each in parts.items() if each is not None}
    names = {part: each for part, each in given.items() if isinstance(each, str)}
    objects = {part: each for part, each in given.items() if part not in names}
    if not objects:
        yield names, NOTHING
        return
    from samestep.user_code import transport

    packed = {part: transport.pack(each, part) for part, each in objects.items()}
    names |= {part: each.name for part, each in packed.items()}
    fd, index = transport.fill(list(packed.values()))
    try:
        yield names, Given(index, {"objects": fd})
    finally:
        os.close(fd)


def batch_of(recipe: Any, data: Part | None) -> dict[str, Any]:
    """Return the global batch as a field, if no recipe but a DataLoader names it."""
    train = data.get("train") if isinstance(data, Mapping) else data
    utilities = sys.modules.get("torch.utils.data")  # if anybody made one
    if recipe is None and utilities and isinstance(train, utilities.DataLoader):
        return {"global_batch": train.batch_size} if train.batch_size else {}
    return {}


def split_fields(fields: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Divide keyword arguments in fields of the recipe and fields of the placement.

    `lr` is short for `optimizer.lr`; two underscores stand for a dot. Raises
    RecipeError for a name that neither has.
    """
    placed_names = Placement.model_fields.keys() | PLACEMENT_NAMES
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
