"""Fields of recipes and placements, and flags, that have had another name.

The old names work for one release, with a warning. In what a run has left (its recipe,
checkpoints and model file) they stay readable, without one.
"""

from collections.abc import Iterable, Mapping
from typing import Any

from samestep.errors import RecipeError, warn_old_name
from samestep.system.json_values import JsonObject


NEW_NAMES = {
    "stop": "early_stopping",
    "start": "init",
    "start.fresh": "init.reinit",
    "optimizer.clip_norm": "optimizer.max_grad_norm",
}
"""Dotted; the other fields of a renamed section keep their names inside of it."""
OLD_NAMES = {new: old for old, new in NEW_NAMES.items()}
PLACEMENT_NAMES = {"evict_slower_than": "drop_stragglers_below"}
FLAGS = {
    "--accept-other-bits": "--allow-different-numerics",
    "--endpoint": "--rdzv-endpoint",
    "--evict-slower-than": "--drop-stragglers-below",
}


def new_flags(arguments: Iterable[str]) -> list[str]:
    """Return a command's arguments with the new flags; warn of each old one."""
    result = []
    for argument in arguments:
        flag, equals, value = argument.partition("=")
        if flag in FLAGS:
            warn_old_name(flag, FLAGS[flag])
        result.append(f"{FLAGS.get(flag, flag)}{equals}{value}")
    return result


def new_name(name: str, names: Mapping[str, str] = NEW_NAMES) -> str:
    """Return the new name of a dotted field; most have none, and keep theirs."""
    section, dot, field = name.rpartition(".")
    if name in names or not dot:
        return names.get(name, name)
    return f"{new_name(section, names)}.{field}"


def rename(
    fields: Mapping[str, Any],
    names: Mapping[str, str] = NEW_NAMES,
    *,
    section: str = "",
    warn: bool = False,
) -> JsonObject:
    """Return the fields of a recipe, a placement or a `section` under their new names.

    Keys may be dotted, as in overrides. Raises RecipeError where a field has both.
    """
    result: JsonObject = {}
    given: dict[str, str] = {}
    for key, value in fields.items():
        name = f"{section}.{key}" if section else str(key)
        new = new_name(name, names)
        if new in given:
            raise RecipeError(
                f"`{given[new]}` and `{name}` are the old and the new name of one "
                "field. Give it only once, under its new name."
            )
        given[new] = name
        if warn and (name in names or (new != name and not section)):
            warn_old_name(name, new)
        if isinstance(value, Mapping) and any(n.startswith(f"{name}.") for n in names):
            value = rename(value, names, section=name, warn=warn)
        result[new.rpartition(".")[2] if section else new] = value
    return result
