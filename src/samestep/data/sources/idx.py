"""The IDX files of MNIST and its likes, in a directory of their own.

A file is two zero bytes, a byte for the type (8: unsigned bytes), one for the number of
dimensions, these as big-endian 32-bit numbers, and the values.
"""

import gzip
import hashlib
import math
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from samestep.config.data import FashionData, IdxData
from samestep.data.sources.source import (
    Array,
    ArraySource,
    Pair,
    describe_files,
    first_notice,
    mapped,
    reading,
)
from samestep.errors import DataError
from samestep.files import cache
from samestep.system.json_values import JsonObject


FASHION = Path("/usr/share/datasets/fashion-mnist")
"""Where Debian's package `dataset-fashion-mnist` puts its files."""
FASHION_CLASSES = (
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
)
PREFIXES = {"train": "train", "test": "t10k"}
UNSIGNED_BYTES = 8
MOST_HEADER = 16
"""Bytes before the values, of three dimensions."""


@dataclass(frozen=True)
class IdxFile:
    """One IDX file, perhaps compressed."""

    path: Path
    sha256: str | None = None
    """The checksum of the uncompressed content, if it is known."""
    remedy: str = ""
    """Ends the message about a damaged file."""

    def prepare(self) -> str | None:
        """Unpack it into the cache. Returns a notice. Raises DataError."""
        if not self._is_packed:
            return None
        # Known files are small: a full disk costs a notice, not the training.
        size = 0 if self.sha256 else self._unpacked_size()
        return cache.prepare(self._key, self._unpack, size)

    def array(self, dimensions: int) -> Array:
        """Map its values, unsigned bytes [...]. Raises DataError."""
        content = self._content()
        first = 4 + 4 * dimensions
        header = bytes(content[:first])
        shape = _shape(header, dimensions)
        if shape is None:
            raise DataError(
                f"{self.path} must be an IDX file of unsigned bytes in {dimensions} "
                f"dimensions, which begins with 0 0 8 {dimensions}; it begins with "
                f"{' '.join(map(str, header[:4]))}."
            )
        if math.prod(shape) != len(content) - first:
            raise self._damaged(
                f"its header says {list(shape)}, {math.prod(shape):,} values; it has "
                f"{len(content) - first:,}"
            )
        return content[first:].reshape(shape)

    @property
    def _is_packed(self) -> bool:
        return self.path.suffix == ".gz"

    @property
    def _key(self) -> str:
        with reading(self.path, self.remedy):
            return f"{self.path.stem}-{cache.sha256_of(self.path)[:16]}"

    def _content(self) -> cache.Bytes:
        if not self._is_packed:
            return mapped(self.path)
        with reading(self.path, self.remedy):
            return cache.read(self._key, self._unpack)

    def _unpacked_size(self) -> int:
        """Return the size that the header of the content claims. Raises DataError."""
        with gzip.open(self.path) as file:
            header = self._piece(file, MOST_HEADER)
        for dimensions in (1, 3):
            shape = _shape(header, dimensions)
            if shape is not None:
                return 4 + 4 * dimensions + math.prod(shape)
        return len(header)  # `array` says what is wrong with it

    def _unpack(self, sink: BinaryIO) -> None:
        digest = hashlib.sha256()
        left = self._unpacked_size() + 1  # one more shows that it is too long
        with gzip.open(self.path) as file:
            while left and (piece := self._piece(file, min(left, cache.CHUNK))):
                digest.update(piece)
                sink.write(piece)
                left -= len(piece)
        if self.sha256 not in (None, digest.hexdigest()):
            raise self._damaged(
                f"its content must have the SHA-256 {self.sha256}, and has "
                f"{digest.hexdigest()}"
            )

    def _piece(self, file: gzip.GzipFile, most: int) -> bytes:
        try:
            return file.read(most)
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise self._damaged(str(error)) from None

    def _damaged(self, reason: str) -> DataError:
        return DataError(f"{self.path} is damaged: {reason}. {self.remedy}".rstrip())


Files = Mapping[str, tuple[IdxFile, IdxFile]]
"""The images and the labels of each split."""


@dataclass(frozen=True)
class IdxSource(ArraySource):
    recipe: IdxData | FashionData

    def prepare(self) -> str | None:
        """Unpack compressed files into the cache."""
        return prepare(self.files())

    def describe(self) -> JsonObject:
        """Return name, size and SHA-256 of each file. Raises DataError."""
        files = [str(file.path) for pair in self.files().values() for file in pair]
        is_fashion = isinstance(self.recipe, FashionData)
        names = {"classes": FASHION_CLASSES} if is_fashion else {}
        return describe_files(self.recipe.source, files) | names

    def arrays(self) -> Mapping[str, Pair]:
        """Return `train`, and `test` if it is there. Raises DataError."""
        return pairs(self.files())

    def files(self) -> Files:
        """Return the files of the splits that are there. Raises DataError."""
        folder = FASHION if self.recipe.path is None else Path(self.recipe.path)
        if isinstance(self.recipe, FashionData) and not folder.is_dir():
            raise DataError(
                f"Fashion-MNIST is expected in {folder}, which is not there. Install "
                "it with `apt-get install dataset-fashion-mnist` (Debian, Ubuntu), or "
                "give the directory of its four files: `--set data.path=...`."
            )
        files = {}
        for split, prefix in PREFIXES.items():
            images = _find(folder, f"{prefix}-images", "idx3-ubyte")
            labels = _find(folder, f"{prefix}-labels", "idx1-ubyte")
            if images and labels:
                files[split] = IdxFile(images), IdxFile(labels)
            elif images or labels or split == "train":
                missing = "labels-idx1" if images else "images-idx3"
                raise DataError(
                    f"{folder} has no file {prefix}-{missing}-ubyte (perhaps with "
                    ".gz). An IDX data set is train-images-idx3-ubyte, "
                    "train-labels-idx1-ubyte, and for the test "
                    "t10k-images-idx3-ubyte, t10k-labels-idx1-ubyte."
                )
        return files


def prepare(files: Files) -> str | None:
    """Unpack compressed files into the cache. Returns a notice. Raises DataError."""
    return first_notice(file.prepare() for pair in files.values() for file in pair)


def pairs(files: Files) -> dict[str, Pair]:
    """Map images [n, height, width] and labels [n] of each split. Raises DataError."""
    return {
        split: Pair(images.array(3), labels.array(1), str(images.path))
        for split, (images, labels) in files.items()
    }


def _shape(header: bytes, dimensions: int) -> tuple[int, ...] | None:
    """Return the shape in a header; None if that has other dimensions or no bytes."""
    first = 4 + 4 * dimensions
    magic = bytes((0, 0, UNSIGNED_BYTES, dimensions))
    if header[:4] != magic or len(header) < first:
        return None
    return tuple(map(int, np.frombuffer(header[4:first], ">u4")))


def _find(folder: Path, stem: str, kind: str) -> Path | None:
    """Return the file of this kind; some archives have a dot before the kind."""
    names = [f"{stem}{dot}{kind}{end}" for dot in "-." for end in ("", ".gz")]
    return next((folder / name for name in names if (folder / name).is_file()), None)
