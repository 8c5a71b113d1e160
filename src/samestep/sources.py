"""What the supervisor does with the data of a recipe; without torch."""

from typing import Any

from samestep.data import mnist, text
from samestep.ingredients import CustomData, DataRecipe, MnistData, TextData


def prepare(recipe: DataRecipe) -> str | None:
    """Before any worker starts. Returns a notice for the user. Raises DataError."""
    match recipe:
        case MnistData():
            return mnist.prepare()
        case TextData() | CustomData():
            return None


def describe(recipe: DataRecipe) -> dict[str, Any]:
    """Name, size and checksums, for the run's record."""
    match recipe:
        case MnistData():
            return mnist.describe()
        case TextData():
            return text.describe(recipe)
        case CustomData():
            return {"source": "custom", "load": recipe.load}
