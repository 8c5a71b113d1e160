"""Messages as lines of JSON, and as records in the files of a run."""

import json
from dataclasses import asdict, fields, is_dataclass
from functools import cache
from types import UnionType
from typing import Any, get_args, get_origin, get_type_hints

from samestep.errors import WorkerFailed
from samestep.system.json_values import JsonObject


INLINE = {"inline": True}
"""Marks a field whose entries stand in a record beside the other fields."""
OPTIONAL = {"optional": True}
"""Marks a field that a record has only where it is not None."""
ELSEWHERE = {"elsewhere": True}
"""Marks a field that goes into another file than the record."""


def encode(message: Any) -> bytes:
    """Return a message as one line of JSON: its class as `type`, and its fields.

    NaN and infinity are written as Python's `json` module writes them.
    """
    content = {"type": type(message).__name__, **asdict(message)}
    return json.dumps(content).encode() + b"\n"


def decode(line: bytes, kinds: UnionType | type) -> Any:
    """Return the message in a line, which is of one of `kinds`. Raises WorkerFailed."""
    try:
        content = json.loads(line)
        classes = {kind.__name__: kind for kind in get_args(kinds) or (kinds,)}
        return _build(classes[content.pop("type")], content)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise WorkerFailed(
            "Processes of one training exchange the messages of `samestep.messages`; "
            f"received {line[:100]!r} ({type(error).__name__}: {error}). Do they run "
            "the same version of samestep?"
        ) from error


def as_record(message: Any) -> JsonObject:
    """Return the fields of a message as they stand in the files of a run."""
    record: JsonObject = {}
    for each in fields(message):
        value = getattr(message, each.name)
        if "inline" in each.metadata:
            record |= as_record(value) if is_dataclass(value) else value
        elif "elsewhere" in each.metadata:
            continue
        elif value is not None or "optional" not in each.metadata:
            record[each.name] = value
    return record


def _build(kind: Any, value: Any) -> Any:
    """Return `value`, with dataclasses and tuples where `kind` has them."""
    if isinstance(kind, type) and is_dataclass(kind):
        hints = _hints(kind)
        built = {name: _build(hints[name], each) for name, each in value.items()}
        return kind(**built)
    if get_origin(kind) is list:
        return [_build(get_args(kind)[0], each) for each in value]
    if get_origin(kind) is tuple:
        return tuple(value)
    if hasattr(kind, "_fields"):
        return kind(*value)
    return value


@cache
def _hints(kind: type) -> JsonObject:
    return get_type_hints(kind)
