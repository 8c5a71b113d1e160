"""The file of weights that a training starts from, and its SHA-256; no torch."""

import hashlib
from pathlib import Path

from samestep.config.recipe import Recipe
from samestep.config.training import InitRecipe
from samestep.errors import RecipeError
from samestep.files import untrusted
from samestep.output.run import MODEL_FILE


MOST_BYTES = 1 << 40


def resolved(recipe: Recipe) -> Recipe:
    """Return the recipe with the file's absolute path and SHA-256.

    Raises as `read` does.
    """
    if recipe.init is None:
        return recipe
    path, _, sha256 = read(recipe.init)
    return recipe.changed({"init.weights": str(path), "init.sha256": sha256})


def read(init: InitRecipe) -> tuple[Path, bytes, str]:
    """Return the file's path, its content, and the SHA-256 of that.

    Raises RecipeError if it cannot be read, or is not the one that the recipe means.
    """
    path = Path(init.weights).absolute()
    path = path / MODEL_FILE if path.is_dir() else path
    try:
        content = untrusted.read_bytes(path, MOST_BYTES)
    except OSError as error:
        raise RecipeError(
            "`init.weights` is a file of weights, or the directory of a run that has "
            f"one; {path} cannot be read: {error.strerror}."
        ) from None
    sha256 = hashlib.sha256(content).hexdigest()
    if init.sha256 not in (None, sha256):
        raise RecipeError(
            f"The initial weights decide the result: {path} must have the "
            f"SHA-256 {init.sha256}, and has {sha256}. Bring back that file, or train "
            "a new run without `init.sha256`."
        )
    return path, content, sha256
