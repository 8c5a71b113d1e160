"""The kinds of each section of a recipe, and overrides of their fields."""

from collections.abc import Mapping
from typing import Any, get_args

from samestep.config.data import Augment, DataRecipe
from samestep.config.model import LossRecipe, ModelRecipe, Section
from samestep.config.optimizer import OptimizerRecipe
from samestep.config.schedule import ScheduleRecipe
from samestep.config.training import EarlyStoppingRecipe, EmaRecipe, InitRecipe
from samestep.errors import RecipeError
from samestep.system.json_values import JsonObject


def _tagged(tag: str, union: Any) -> dict[str, type[Section]]:
    """Return the kinds of a section by the value of their tag."""
    kinds, *_ = get_args(union)
    return {kind.model_fields[tag].default: kind for kind in get_args(kinds)}


TAGS = {
    "data": "source",
    "model": "family",
    "loss": "name",
    "optimizer": "name",
    "schedule": "name",
}
"""The field of each section that names its kind."""
KINDS: dict[str, dict[str, type[Section]]] = {
    "data": _tagged("source", DataRecipe),
    "model": _tagged("family", ModelRecipe),
    "loss": _tagged("name", LossRecipe),
    "optimizer": _tagged("name", OptimizerRecipe),
    "schedule": _tagged("name", ScheduleRecipe),
    "data.augment": {"": Augment},
    "ema": {"": EmaRecipe},
    "init": {"": InitRecipe},
    "early_stopping": {"": EarlyStoppingRecipe},
}
"""The kinds of each section by their tag; sections of one kind have no tag."""


LENGTHS = ("epochs", "max_steps")


def override(fields: JsonObject, overrides: Mapping[str, Any]) -> JsonObject:
    """Override fields by dotted name, in place, and return them.

    A length of the training, `epochs` or `max_steps`, replaces the other one.
    """
    for length, other in (LENGTHS, LENGTHS[::-1]):
        if length in overrides and other not in overrides:
            fields.pop(other, None)
    for section, tag in TAGS.items():
        kind = overrides.get(f"{section}.{tag}")
        if isinstance(fields.get(section), dict) and kind in KINDS[section]:
            fields[section] = _of_kind(fields[section], section, str(kind))
    for dotted, value in overrides.items():
        _override(fields, dotted, value)
    return fields


def _of_kind(values: JsonObject, section: str, kind: str) -> JsonObject:
    """Return the values of a section that mean the same in another kind of it."""
    options, tag = KINDS[section], TAGS[section]
    old = values.get(tag, next(iter(options)))
    if old == kind or old not in options:
        return values
    before, after = options[old].model_fields, options[kind].model_fields

    def stays(name: str, value: Any) -> bool:
        if name not in before or name not in after:
            return False
        one, other = before[name], after[name]
        is_same = (one.annotation, one.metadata) == (other.annotation, other.metadata)
        # A default gives way to the default of the other kind.
        return is_same and value != one.get_default(call_default_factory=True)

    return {name: value for name, value in values.items() if stays(name, value)}


def _override(fields: JsonObject, dotted: str, value: Any) -> None:
    *sections, last = dotted.split(".")
    for section in sections:
        fields = fields.setdefault(section, {})
        if not isinstance(fields, dict):
            raise RecipeError(f"`{dotted}`: `{section}` is a value, not a section.")
    fields[last] = value
