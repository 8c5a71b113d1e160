"""Explains pydantic's errors about a recipe, in the words of its fields."""

from collections.abc import Iterable
from typing import Any

from pydantic import ValidationError

from samestep.config.model import Section
from samestep.config.sections import KINDS, TAGS
from samestep.errors import did_you_mean
from samestep.system.json_values import JsonObject


MOST_SHOWN = 200
"""Characters of a value in a message."""


def explain(error: ValidationError, origin: str, fields: Iterable[str]) -> str:
    """Return a message that names every wrong field of a recipe.

    `fields` are those of a recipe, `origin` where this one comes from.
    """
    known = list(fields)
    first, *others = (_explain_field(dict(detail), known) for detail in error.errors())
    return " ".join([f"{origin}: {first}", *(f[0].upper() + f[1:] for f in others)])


def _explain_field(detail: JsonObject, fields: list[str]) -> str:
    section, known = _fields_at(detail["loc"], fields)
    dotted = ".".join(section)
    if detail["type"] == "extra_forbidden":
        hint = did_you_mean(section[-1], known, ".".join(section[:-1]))
        return f"there is no field `{dotted}`.{hint}"
    if detail["type"] == "missing":
        return f"`{dotted}` is missing."
    if detail["type"].startswith("union_tag"):
        return _explain_kind(section[0], detail)
    message = detail["msg"].removeprefix("Value error, ")
    if detail["type"] == "value_error":
        return f"{message}."
    expected = message[0].lower() + message[1:]
    return f"`{dotted}`: {expected}; received `{_shown(detail['input'])}`."


def _shown(value: Any) -> str:
    try:
        text = repr(value)
    except ValueError:  # a whole number of more than 4,300 digits
        return "a very long number"
    return text if len(text) <= MOST_SHOWN else f"{text[:MOST_SHOWN]}..."


def _explain_kind(section: str, detail: JsonObject) -> str:
    """Explain that the kind of a section is missing or unknown."""
    tag = TAGS[section]
    kinds = [kind for kind in KINDS[section] if kind != "custom"]
    custom = ""
    if "custom" in KINDS[section]:
        custom = f"; or name your own, `--{section} module:function`"
    name, options = f"`{section}.{tag}`", f"one of {', '.join(kinds)}{custom}"
    received = detail.get("ctx", {}).get("tag")
    if received is None:
        return f"{name} is missing; it is {options}."
    hint = did_you_mean(str(received), kinds)
    return f"{name} is {options}; received `{received}`.{hint}"


def _fields_at(
    location: tuple[str | int, ...], known: list[str]
) -> tuple[list[str], list[str]]:
    """Return pydantic's location of an error as a path in the recipe.

    Returns also the known fields where the path ends. pydantic puts the tags of unions
    into the location, which are no fields.
    """
    path: list[str] = []
    kinds: dict[str, type[Section]] = {}
    for step in map(str, location):
        tag = step
        if step not in kinds:
            path.append(step)
            kinds, tag = KINDS.get(".".join(path), {}), ""
        if tag in kinds:
            known, kinds = list(kinds[tag].model_fields), {}
    return path, known
