"""What the supervisor does with the data of a recipe; without torch."""

from collections.abc import Mapping
from typing import Any

from samestep.config.data import (
    CustomData,
    DataRecipe,
    FashionData,
    IdxData,
    ImageData,
    MnistData,
    NpyData,
    NpzData,
    TableData,
    TextData,
)
from samestep.data.sources import idx, image_folder, mnist, npy, tables, text


def prepare(recipe: DataRecipe) -> str | None:
    """Before any worker starts. Returns a notice for the user. Raises DataError."""
    match recipe:
        case MnistData():
            return mnist.prepare()
        case IdxData() | FashionData():
            return idx.prepare(recipe)
        case NpyData() | NpzData():
            return npy.prepare(recipe)
        case ImageData():
            return image_folder.prepare(recipe)
        case TextData() | CustomData() | TableData():
            return None


def describe(recipe: DataRecipe) -> dict[str, Any]:
    """Name, size and checksums, for the run's record. Raises DataError."""
    match recipe:
        case MnistData():
            return mnist.describe()
        case TextData():
            return text.describe(recipe)
        case CustomData():
            return {"source": "custom", "load": recipe.load}
        case IdxData() | FashionData():
            return idx.describe(recipe)
        case NpyData() | NpzData():
            return npy.describe(recipe)
        case ImageData():
            return image_folder.describe(recipe)
        case TableData():
            return tables.describe(recipe)


def checksums(described: Mapping[str, Any]) -> dict[str, str]:
    """SHA-256 of each file or folder that is not part of the package.

    With other data, a run does not go on.
    """
    if described["source"] == "mnist":
        return {}
    parts = {**described.get("files", {}), **described.get("splits", {})}
    if "sha256" in described:
        parts[described["path"]] = described
    return {f"data {name}": str(part["sha256"]) for name, part in parts.items()}
