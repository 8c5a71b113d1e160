"""The type of JSON objects."""

from typing import Any


JsonObject = dict[str, Any]
"""JSON values by name; the names depend on the recipe, the data or the machine."""
