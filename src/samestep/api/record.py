"""Write a training as a program file, which needs no Python to be repeated."""

from pathlib import Path

from samestep.config.recipe import Recipe
from samestep.errors import RecipeError


def record(recipe: Recipe | str | Path, path: Path | str) -> Path:
    """Write the training of a portable recipe to a file, and return its path.

    The runner, which `python -m samestep.kernels.compiling --runner FILE` compiles,
    repeats it and prints the fingerprint that `train` gives the recipe. Raises
    RecipeError, DataError, KernelError, OSError.
    """
    # They import torch.
    from samestep.models.device import Device
    from samestep.portable.training_file import training_file
    from samestep.training.components import load_and_build
    from samestep.user_code.imports import search_path
    from samestep.user_code.references import UserCode

    if not isinstance(recipe, Recipe):
        recipe = Recipe.load(recipe)
    if not recipe.is_portable:
        raise RecipeError(
            'Only a recipe with `arithmetic = "portable"` can be repeated without '
            f"PyTorch; that of {recipe.name} is `torch`."
        )
    parts = load_and_build(recipe, UserCode(search_path()), None, Device())
    file = training_file(recipe, parts.model, parts.data, parts.plan, parts.flat)
    path = Path(path)
    file.write(path)
    return path
