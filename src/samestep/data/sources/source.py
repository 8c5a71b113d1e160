"""What a source of data does in the supervisor; no torch, which only workers import."""

import importlib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from samestep.config.data import CustomData, Divided
from samestep.errors import DataError
from samestep.files import cache, untrusted
from samestep.system.json_values import JsonObject


Array = NDArray[Any]

SPLITS = ("train", "validation", "test")


class Source(ABC):
    """The data of one recipe."""

    may_be_slow = False
    """Whether drawing samples may take longer than copying them in memory: workers then
    fork a process that can draw them ahead of time."""

    def prepare(self) -> str | None:
        """Fill the cache, before any worker starts.

        Returns a notice for the user. Raises DataError.
        """
        return None

    @abstractmethod
    def describe(self) -> JsonObject:
        """Return name, sizes and checksums, for the run's record. Raises DataError."""


@dataclass(frozen=True)
class CustomSource(Source):
    """Data of the user's own, whose code the supervisor does not run."""

    recipe: CustomData
    may_be_slow = True

    def describe(self) -> JsonObject:
        """Return the function's name."""
        return {"source": "custom", "load": self.recipe.load}


@dataclass(frozen=True)
class Pair:
    """Inputs [n, ...] and targets [n, ...] of one split; `who` names them."""

    inputs: Array
    targets: Array
    who: str


@dataclass(frozen=True)
class ArraySource(Source):
    """A source of arrays."""

    recipe: Divided

    @abstractmethod
    def arrays(self) -> Mapping[str, Pair]:
        """Return `train` and the other splits that are given. Raises DataError."""


def describe_files(source: str, names: Iterable[str | None]) -> JsonObject:
    """Return size and SHA-256 of each file, for a run's record. Raises DataError."""
    files = {}
    for name in filter(None, names):
        path = Path(name)
        with reading(path):
            sha256 = cache.sha256_of(path)
            files[name] = {"bytes": path.stat().st_size, "sha256": sha256}
    return {"source": source, "files": files}


@contextmanager
def reading(path: Path, remedy: str = "") -> Iterator[None]:
    """Turn OSError inside into DataError, with the name of the file."""
    try:
        yield
    except OSError as error:
        why = f"{path} cannot be read: {error.strerror or error}."
        raise DataError(f"{why} {remedy}".rstrip()) from None


def mapped(path: Path) -> cache.Bytes:
    """Map the bytes of a file, read-only. Raises DataError."""
    with reading(path):
        untrusted.check_regular(path)
        if path.stat().st_size == 0:  # which cannot be mapped
            return np.empty(0, np.uint8)
        # Read-only: a private copy-on-write map could not be larger than the memory.
        return np.asarray(np.memmap(path, np.uint8, "r"))


def library(name: str, reads: str) -> ModuleType:
    """Import a library of the extra `data`. Raises DataError if it is not there."""
    try:
        return importlib.import_module(name)
    except ImportError:
        raise DataError(
            f"{reads}, which is not installed: `pip install 'samestep[data]'`."
        ) from None


def first_notice(notices: Iterable[str | None]) -> str | None:
    """Exhaust the notices of `cache.prepare`, which say the same; return the first."""
    return next(filter(None, list(notices)), None)
