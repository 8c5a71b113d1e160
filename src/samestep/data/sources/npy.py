"""Arrays in .npy and .npz files, mapped: only the rows that are used are read."""

import io
import math
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, BinaryIO

import numpy as np
from numpy.lib import format as npy

from samestep.config.data import NpyData, NpzData
from samestep.data.sources.source import (
    SPLITS,
    Array,
    ArraySource,
    Pair,
    describe_files,
    first_notice,
    mapped,
    reading,
)
from samestep.errors import DataError, did_you_mean
from samestep.files import cache, untrusted
from samestep.system.json_values import JsonObject


KEYS = {split: (f"x_{split}", f"y_{split}") for split in SPLITS}
LOCAL_HEADER = 30
"""Bytes of the fixed part of a ZIP member's own header (APPNOTE.TXT, 4.3.7)."""
MOST_HEADER = 1 << 16
"""Bytes of an .npy file before its values."""


@dataclass(frozen=True)
class NpySource(ArraySource):
    recipe: NpyData
    may_be_slow = True  # the files may be larger than the memory

    def describe(self) -> JsonObject:
        """Return name, size and SHA-256 of each file. Raises DataError."""
        recipe = self.recipe
        files = [recipe.inputs, recipe.targets, recipe.test_inputs, recipe.test_targets]
        return describe_files(recipe.source, files)

    def arrays(self) -> Mapping[str, Pair]:
        """Map `train`, and `test` if it is given. Raises DataError."""
        recipe = self.recipe
        pairs = {"train": _pair(recipe.inputs, recipe.targets)}
        if recipe.test_inputs and recipe.test_targets:
            pairs["test"] = _pair(recipe.test_inputs, recipe.test_targets)
        return pairs


@dataclass(frozen=True)
class NpzSource(ArraySource):
    recipe: NpzData

    def prepare(self) -> str | None:
        """Unpack what is compressed into the cache. Returns a notice."""
        path = Path(self.recipe.path)
        with _zip(path) as file:
            members = file.infolist()
        return first_notice(
            cache.prepare(_key(path, m), _unpacking(path, m), m.file_size)
            for m in members
            if m.compress_type != zipfile.ZIP_STORED
        )

    def describe(self) -> JsonObject:
        """Return name, size and SHA-256 of the file. Raises DataError."""
        return describe_files(self.recipe.source, [self.recipe.path])

    def arrays(self) -> Mapping[str, Pair]:
        """Map `train` and the other splits in the file. Raises DataError."""
        path = Path(self.recipe.path)
        with _zip(path) as file:
            members = {m.filename.removesuffix(".npy"): m for m in file.infolist()}
            arrays = {name: _member(path, file, m) for name, m in members.items()}
        _check_names(list(arrays), path)
        return {
            split: Pair(arrays[x], arrays[y], f"{path}, split `{split}`")
            for split, (x, y) in KEYS.items()
            if x in arrays
        }


def _check_names(names: list[str], path: Path) -> None:
    """Raise DataError unless the arrays of an .npz file are pairs."""
    known = [key for keys in KEYS.values() for key in keys]
    rule = (
        "The arrays of an .npz file are pairs: x_train, y_train and perhaps "
        f"{', '.join(known[2:])}"
    )
    for name in names:
        if name not in known:
            hint = did_you_mean(name, known)
            raise DataError(f"{rule}; {path} has `{name}`.{hint}")
        other = name.translate(str.maketrans("xy", "yx"))
        if other not in names:
            raise DataError(f"{rule}; {path} has `{name}` without `{other}`.")
    if "x_train" not in names:
        raise DataError(f"{path} must have x_train and y_train; it has {names}.")


def _pair(inputs: str, targets: str) -> Pair:
    return Pair(_mapped(inputs), _mapped(targets), inputs)


def _mapped(name: str) -> Array:
    """Map the array of an .npy file. Raises DataError."""
    try:
        return _parsed(mapped(Path(name)))
    except ValueError as error:
        raise DataError(f"{name} is not an .npy file of numbers: {error}.") from None


def _zip(path: Path) -> zipfile.ZipFile:
    with reading(path):
        untrusted.check_regular(path)
        try:
            return zipfile.ZipFile(path)
        except OSError:
            raise
        except Exception:  # damaged ones raise almost anything
            raise DataError(
                f"{path} is not an .npz file, as numpy.savez writes it."
            ) from None


def _member(path: Path, file: zipfile.ZipFile, member: zipfile.ZipInfo) -> Array:
    """Map one array in place, or from the cache if it is compressed."""
    if member.compress_type == zipfile.ZIP_STORED:
        # zipfile gives no position of the content: it comes after the member's own
        # header, whose length is not the one in the ZIP's directory.
        whole = mapped(path)
        header = whole[member.header_offset :][:LOCAL_HEADER].tobytes()
        lengths = np.frombuffer(header[26:].ljust(4, b"\0"), "<u2")
        start = member.header_offset + LOCAL_HEADER + int(lengths.sum())
        content = whole[start : start + member.file_size]
    else:
        content = cache.read(_key(path, member), _unpacking(path, member))
    try:
        return _parsed(content)
    except ValueError as error:
        raise DataError(
            f"`{member.filename}` in {path} is not an array of numbers: {error}."
        ) from None


def _parsed(content: cache.Bytes) -> Array:
    """Return the array of an .npy file's content, on the same memory.

    Raises ValueError.
    """
    stream = io.BytesIO(content[:MOST_HEADER].tobytes())
    try:
        is_first = npy.read_magic(stream) == (1, 0)
        read = npy.read_array_header_1_0 if is_first else npy.read_array_header_2_0
        shape, is_fortran, dtype = read(stream)
    except Exception as error:  # it is Python text, parsed by numpy: anything may come
        raise ValueError(f"its header cannot be read ({error})") from None
    if dtype.hasobject or dtype.subdtype or not dtype.itemsize:
        raise ValueError(f"it holds {'Python objects' if dtype.hasobject else dtype}")
    if any(type(size) is not int for size in shape):  # numpy takes True for one
        raise ValueError(f"its shape is {shape}")
    size = math.prod(shape) * dtype.itemsize
    if min(shape, default=0) < 0 or size > len(content) - stream.tell():
        raise ValueError(f"it has too few values for the shape {shape}")
    values = content[stream.tell() :][:size].view(dtype)
    return values.reshape(shape, order="F" if is_fortran else "C")


def _key(path: Path, member: zipfile.ZipInfo) -> str:
    """Identify the content by what the ZIP's directory has, so nothing is read."""
    stat = path.stat()
    return (
        f"npz-{stat.st_size:x}-{stat.st_mtime_ns:x}-{member.CRC:08x}-"
        f"{member.file_size:x}-{member.header_offset:x}"
    )


def _unpacking(path: Path, member: zipfile.ZipInfo) -> cache.Fill:
    def fill(sink: BinaryIO) -> None:
        with _blaming(path), zipfile.ZipFile(path) as file:
            content = file.open(member)
        with content:  # which keeps the file open
            while piece := _piece(content, path):
                sink.write(piece)

    return fill


def _piece(content: IO[bytes], path: Path) -> bytes:
    with _blaming(path):
        return content.read(cache.CHUNK)


@contextmanager
def _blaming(path: Path) -> Iterator[None]:
    """Turn any exception into DataError: damaged ZIP files raise almost anything."""
    try:
        yield
    except Exception as error:
        raise DataError(f"{path} is damaged: {error}.") from None
