"""One module for each source of data; `source_of` finds the one of a recipe.

Supervisors import all but `rows`, `samples` and `user_dataset`, which import torch.
Imports `data` and below.
"""

from collections.abc import Mapping
from typing import Any

from samestep.config import data
from samestep.config.data import DataRecipe
from samestep.data.sources.idx import IdxSource
from samestep.data.sources.image_folder import ImageSource
from samestep.data.sources.mnist import MnistSource
from samestep.data.sources.npy import NpySource, NpzSource
from samestep.data.sources.source import CustomSource, Source
from samestep.data.sources.tables import TableSource
from samestep.data.sources.text import TextSource


def source_of(recipe: DataRecipe) -> Source:
    """Return the source that a recipe names."""
    match recipe:
        case data.MnistData():
            return MnistSource(recipe)
        case data.TextData():
            return TextSource(recipe)
        case data.CustomData():
            return CustomSource(recipe)
        case data.IdxData() | data.FashionData():
            return IdxSource(recipe)
        case data.NpzData():
            return NpzSource(recipe)
        case data.NpyData():
            return NpySource(recipe)
        case data.ImageData():
            return ImageSource(recipe)
        case data.TableData():
            return TableSource(recipe)


def checksums(described: Mapping[str, Any]) -> dict[str, str]:
    """Return the SHA-256 of each file or folder that is not part of the package.

    A run is resumed only with the same.
    """
    if described["source"] == "mnist":
        return {}
    parts = {**described.get("files", {}), **described.get("splits", {})}
    if "sha256" in described:
        parts[described["path"]] = described
    return {f"data {name}": str(part["sha256"]) for name, part in parts.items()}
