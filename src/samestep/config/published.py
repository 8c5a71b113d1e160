"""The published fingerprints of the built-in recipes with portable arithmetic."""

import json

from samestep.config.data import TextData
from samestep.config.recipe import BUILT_IN, Recipe
from samestep.errors import RecipeError


FILE = "published.json"
"""Has the version of the arithmetic, and for each recipe the digest of its fields and
the SHA-256 of its weights. tests/golden.py writes it."""


def is_published(recipe: Recipe) -> bool:
    """Return whether a built-in recipe has one fingerprint everywhere.

    Texts are Python's standard library, and each version of Python has another.
    """
    return recipe.is_portable and not isinstance(recipe.data, TextData)


def fingerprint(recipe: Recipe, arithmetic: str) -> tuple[str, str] | None:
    """Return the built-in recipe with these fields, and its published fingerprint.

    None if there is none, as for another arithmetic or after any change of the recipe.
    """
    published = json.loads(BUILT_IN.joinpath(FILE).read_text())
    if arithmetic != published["arithmetic"]:
        return None
    for name, entry in published["recipes"].items():
        if entry["recipe_sha256"] == recipe.digest:
            return name, entry["weights_sha256"]
    return None


def of_built_in(name: str, arithmetic: str) -> str:
    """Return the published fingerprint of a built-in recipe. Raises RecipeError."""
    recipe = Recipe.load(name)
    found = fingerprint(recipe, arithmetic)
    if found is not None:
        return found[1]
    why = f"{name} has that of torch, whose bits depend on the processor"
    if recipe.is_portable:
        why = "this one's has not been computed"
        if not is_published(recipe):
            why = f"{name} reads a text that each version of Python has its own of"
    raise RecipeError(
        "A fingerprint is published for built-in recipes with portable arithmetic, and "
        f"{why}."
    )
