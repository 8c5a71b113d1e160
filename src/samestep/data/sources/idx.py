"""The IDX files of MNIST and its likes, in a directory of their own.

A file is two zero bytes, a byte for the type (8: unsigned bytes), one for the number of
dimensions, these as big-endian 32-bit numbers, and the values.
"""

import gzip
import math
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from samestep.config.data import FashionData, IdxData
from samestep.data.sources.npy import Array, Pair, checked, describe_files, mapped
from samestep.errors import DataError
from samestep.system import cache


FASHION = Path("/usr/share/datasets/fashion-mnist")
"""Where Debian's package `dataset-fashion-mnist` puts its files."""
FASHION_CLASSES = (
    *("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat"),
    *("Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"),
)
PREFIXES = {"train": "train", "test": "t10k"}
UNSIGNED_BYTES = 8
MOST_HEADER = 16
"""Bytes before the values, of three dimensions."""


def load(recipe: IdxData | FashionData) -> dict[str, Pair]:
    """`train`, and `test` if it is there. Raises DataError."""
    found = {}
    for split, (images, labels) in _files(recipe).items():
        pair = Pair(_array(images, 3), _array(labels, 1), str(images))
        found[split] = checked(pair)
    return found


def prepare(recipe: IdxData | FashionData) -> str | None:
    """Unpacks what is packed. Returns a notice. Raises DataError."""
    packed = [f for files in _files(recipe).values() for f in files if _is_packed(f)]
    notices = [
        cache.prepare(_key(file), _unpacking(file), _unpacked_size(file))
        for file in packed
    ]
    return next(filter(None, notices), None)


def describe(recipe: IdxData | FashionData) -> dict[str, Any]:
    """Name, size and SHA-256 of each file. Raises DataError."""
    files = [str(file) for pair in _files(recipe).values() for file in pair]
    names = {"classes": FASHION_CLASSES} if recipe.source == "fashion-mnist" else {}
    return describe_files(recipe.source, files) | names


def _files(recipe: IdxData | FashionData) -> dict[str, tuple[Path, Path]]:
    """Images and labels of the splits that are there."""
    folder = FASHION if recipe.path is None else Path(recipe.path)
    if recipe.source == "fashion-mnist" and not folder.is_dir():
        raise DataError(
            f"Fashion-MNIST is expected in {folder}, which is not there. Install it "
            "with `apt-get install dataset-fashion-mnist` (Debian, Ubuntu), or say "
            "where its four files are: `--set data.path=...`."
        )
    found = {}
    for split, prefix in PREFIXES.items():
        images = _find(folder, f"{prefix}-images", "idx3-ubyte")
        labels = _find(folder, f"{prefix}-labels", "idx1-ubyte")
        if (images is None) != (labels is None) or (split == "train" and not images):
            missing = f"{prefix}-{'labels-idx1' if images else 'images-idx3'}-ubyte"
            raise DataError(
                f"{folder} has no file {missing} (perhaps with .gz). An IDX data set "
                "is train-images-idx3-ubyte, train-labels-idx1-ubyte, and for the test "
                "t10k-images-idx3-ubyte, t10k-labels-idx1-ubyte."
            )
        if images and labels:
            found[split] = images, labels
    return found


def _find(folder: Path, stem: str, kind: str) -> Path | None:
    """Some archives write a dot before the kind."""
    names = [f"{stem}{dot}{kind}{end}" for dot in "-." for end in ("", ".gz")]
    return next((folder / name for name in names if (folder / name).is_file()), None)


def _array(path: Path, dimensions: int) -> Array:
    """Unsigned bytes, mapped. Raises DataError."""
    if _is_packed(path):
        try:
            content = cache.read(_key(path), _unpacking(path))
        except OSError as error:
            raise DataError(f"{path} cannot be read: {error.strerror}.") from None
    else:
        content = mapped(path)
    first = 4 + 4 * dimensions
    header = bytes(content[:first])
    if header[:4] != bytes((0, 0, UNSIGNED_BYTES, dimensions)) or len(header) < first:
        raise DataError(
            f"{path} must be an IDX file of unsigned bytes with {dimensions} "
            f"dimension{'s' * (dimensions > 1)}, which begins with the bytes "
            f"0 0 8 {dimensions}; it begins with {' '.join(map(str, header[:4]))}."
        )
    shape = tuple(map(int, np.frombuffer(header, ">u4", offset=4)))
    if math.prod(shape) != len(content) - first:
        raise DataError(
            f"{path} is damaged: its header says {list(shape)}, "
            f"{math.prod(shape):,} values; it has {len(content) - first:,}."
        )
    return content[first:].reshape(shape)


def _is_packed(path: Path) -> bool:
    return path.suffix == ".gz"


def _key(path: Path) -> str:
    return f"{path.stem}-{cache.sha256_of(path)[:16]}"


def _unpacked_size(path: Path) -> int:
    """As the header of the content has it. Raises DataError."""
    with gzip.open(path) as file:
        header = _piece(file, path, MOST_HEADER)
    for dimensions in (1, 3):
        magic, first = bytes((0, 0, UNSIGNED_BYTES, dimensions)), 4 + 4 * dimensions
        if header[:4] == magic and len(header) >= first:
            shape = np.frombuffer(header[4:first], ">u4")
            return first + math.prod(map(int, shape))
    return len(header)  # `_array` says what is wrong with it


def _unpacking(path: Path) -> cache.Fill:
    def fill(sink: cache.Sink) -> None:
        left = _unpacked_size(path) + 1  # with which it is seen to be too long
        with gzip.open(path) as file:
            while left and (piece := _piece(file, path, min(left, cache.CHUNK))):
                sink.write(piece)
                left -= len(piece)

    return fill


def _piece(file: gzip.GzipFile, path: Path, most: int) -> bytes:
    try:
        return file.read(most)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise DataError(f"{path} is damaged: {error}.") from None
