"""What sources of arrays share; no torch, which only the workers import."""

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from samestep.config.data import Divided
from samestep.data.sources.source import Source
from samestep.errors import DataError
from samestep.files import cache, untrusted
from samestep.system.json_values import JsonObject
from samestep.user_code.references import UserCode


if TYPE_CHECKING:
    from samestep.data.splits import Samples
    from samestep.data.targets import Labels

Array = NDArray[Any]

SPLITS = ("train", "validation", "test")


@dataclass(frozen=True)
class Pair:
    """Inputs [n, ...] and targets [n, ...] of one split; `who` names them."""

    inputs: Array
    targets: Array
    who: str


@dataclass(frozen=True)
class ArraySource(Source):
    """A source of arrays, which `arrays` returns."""

    recipe: Divided

    @abstractmethod
    def arrays(self) -> Mapping[str, Pair]:
        """Return `train` and the other splits that are given. Raises DataError."""

    def load(self, user_code: UserCode, labels: "Labels") -> "Samples":
        """Return the splits and what they share. Raises DataError."""
        from samestep.data.sources import rows

        return rows.build(self.recipe, self.arrays(), labels)


def describe_files(source: str, names: list[str]) -> JsonObject:
    """Return size and SHA-256 of each file, for a run's record. Raises DataError."""
    files = {}
    for name in names:
        try:
            sha256 = cache.sha256_of(Path(name))
            files[name] = {"bytes": Path(name).stat().st_size, "sha256": sha256}
        except OSError as error:
            raise DataError(f"{name} cannot be read: {error.strerror}.") from None
    return {"source": source, "files": files}


def mapped(path: Path) -> cache.Bytes:
    """Map the bytes of a file, read-only. Raises DataError."""
    try:
        untrusted.check_regular(path)
        if path.stat().st_size == 0:  # which cannot be mapped
            return np.empty(0, np.uint8)
        # Read-only: a private copy-on-write map could not be larger than the memory.
        return np.asarray(np.memmap(path, np.uint8, "r"))
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}.") from None
