"""Arrays in .npy and .npz files, mapped: only the rows that are used are read."""

import io
import math
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray

from samestep.config.data import NpyData, NpzData
from samestep.errors import DataError, did_you_mean
from samestep.system import cache, untrusted_files


Array = NDArray[Any]

SPLITS = ("train", "validation", "test")
KEYS = {split: (f"x_{split}", f"y_{split}") for split in SPLITS}
LOCAL_HEADER = 30
"""Bytes of the fixed part of a ZIP member's own header (APPNOTE.TXT, 4.3.7)."""
MOST_HEADER = 1 << 16
"""Bytes of an .npy file before its values."""


@dataclass(frozen=True)
class Pair:
    """Inputs [n, ...] and targets [n, ...] of one split; `who` names them."""

    inputs: Array
    targets: Array
    who: str


def load(recipe: NpyData | NpzData) -> dict[str, Pair]:
    """`train` and what else is given. Raises DataError."""
    found = _npy(recipe) if isinstance(recipe, NpyData) else _npz(recipe)
    return {split: checked(pair) for split, pair in found.items()}


def prepare(recipe: NpyData | NpzData) -> str | None:
    """Unpacks what is compressed. Returns a notice. Raises DataError."""
    if isinstance(recipe, NpyData):
        return None
    with _zip(Path(recipe.path)) as file:
        packed = [m for m in file.infolist() if m.compress_type != zipfile.ZIP_STORED]
    path = Path(recipe.path)
    notices = [
        cache.prepare(_key(path, m), _unpacking(path, m), m.file_size) for m in packed
    ]
    return next(filter(None, notices), None)


def describe(recipe: NpyData | NpzData) -> dict[str, Any]:
    """Name, size and SHA-256 of each file. Raises DataError."""
    if isinstance(recipe, NpzData):
        return describe_files(recipe.source, [recipe.path])
    names = (
        *(recipe.inputs, recipe.targets),
        *(recipe.test_inputs, recipe.test_targets),
    )
    return describe_files(recipe.source, [name for name in names if name])


def describe_files(source: str, names: list[str]) -> dict[str, Any]:
    """The same for the files of any source. Raises DataError."""
    found = {}
    for name in names:
        try:
            sha256 = cache.sha256_of(Path(name))
            found[name] = {"bytes": Path(name).stat().st_size, "sha256": sha256}
        except OSError as error:
            raise DataError(f"{name} cannot be read: {error.strerror}.") from None
    return {"source": source, "files": found}


def checked(pair: Pair) -> Pair:
    """Raises DataError unless both are numbers and there are as many of each."""
    for what, array in (("inputs", pair.inputs), ("targets", pair.targets)):
        if array.dtype.kind not in "biuf":
            raise DataError(
                f"Arrays hold integers or floats; the {what} of {pair.who} are "
                f"{array.dtype}."
            )
    shapes = list(pair.inputs.shape), list(pair.targets.shape)
    if not all(shapes) or shapes[0][0] != shapes[1][0]:
        raise DataError(
            "There must be as many targets as inputs; those of "
            f"{pair.who} have the shapes {shapes[1]} and {shapes[0]}."
        )
    return pair


def _npy(recipe: NpyData) -> dict[str, Pair]:
    train = Pair(_mapped(recipe.inputs), _mapped(recipe.targets), recipe.inputs)
    if recipe.test_inputs is None or recipe.test_targets is None:
        return {"train": train}
    inputs, targets = _mapped(recipe.test_inputs), _mapped(recipe.test_targets)
    return {"train": train, "test": Pair(inputs, targets, recipe.test_inputs)}


def _mapped(name: str) -> Array:
    """Read-only: a private copy-on-write map could not be larger than the memory."""
    try:
        return _parsed(mapped(Path(name)))
    except ValueError as error:
        raise DataError(f"{name} is not an .npy file of numbers: {error}.") from None


def mapped(path: Path) -> cache.Bytes:
    """The bytes of a file. Raises DataError."""
    try:
        untrusted_files.check_regular(path)
        if path.stat().st_size == 0:  # which cannot be mapped
            return np.empty(0, np.uint8)
        return np.asarray(np.memmap(path, np.uint8, "r"))
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}.") from None


def _npz(recipe: NpzData) -> dict[str, Pair]:
    path = Path(recipe.path)
    with _zip(path) as file:
        members = {m.filename.removesuffix(".npy"): m for m in file.infolist()}
        arrays = {name: _member(path, file, m) for name, m in members.items()}
    pairs = {
        split: Pair(arrays[x], arrays[y], f"{path}, split `{split}`")
        for split, (x, y) in KEYS.items()
        if x in arrays and y in arrays
    }
    known = [key for keys in KEYS.values() for key in keys]
    for name in arrays:
        other = name.translate(str.maketrans("xy", "yx"))
        if name not in known or other not in arrays:
            raise DataError(
                f"The arrays of an .npz file are pairs: x_train, y_train and perhaps "
                f"{', '.join(known[2:])}; {path} has `{name}`"
                + (
                    f".{did_you_mean(name, known)}"
                    if name not in known
                    else f" without `{other}`."
                )
            )
    if "train" not in pairs:
        raise DataError(f"{path} must have x_train and y_train; it has {list(arrays)}.")
    return pairs


def _zip(path: Path) -> zipfile.ZipFile:
    try:
        untrusted_files.check_regular(path)
        return zipfile.ZipFile(path)
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}.") from None
    except Exception:  # damaged ones raise almost anything
        raise DataError(
            f"{path} is not an .npz file, as numpy.savez writes it."
        ) from None


def _member(path: Path, file: zipfile.ZipFile, member: zipfile.ZipInfo) -> Array:
    """One array: mapped in place, or from the cache if it is compressed."""
    if member.compress_type == zipfile.ZIP_STORED:
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
    """The array of an .npy file's content, on the same memory. Raises ValueError."""
    stream = io.BytesIO(content[:MOST_HEADER].tobytes())
    shape, is_fortran, dtype = _header(stream)
    size = math.prod(shape) * dtype.itemsize
    if min(shape, default=0) < 0 or size > len(content) - stream.tell():
        raise ValueError(f"it has too few values for the shape {shape}")
    values = content[stream.tell() :][:size].view(dtype)
    return values.reshape(shape, order="F" if is_fortran else "C")


def _header(stream: io.BytesIO) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    """Shape, order and type. Raises ValueError."""
    read = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}
    version = npy.read_magic(stream)
    if version not in read:
        raise ValueError(f"its format has version {version}")
    try:
        shape, is_fortran, dtype = read[version](stream)
    except Exception as error:  # it is Python text, parsed by numpy: anything may come
        raise ValueError(f"its header cannot be read ({error})") from None
    if dtype.hasobject:
        raise ValueError("it holds Python objects")
    if dtype.subdtype or not dtype.itemsize:
        raise ValueError(f"it holds {dtype}")
    if any(type(size) is not int for size in shape):  # numpy takes True for one
        raise ValueError(f"its shape is {shape}")
    return shape, is_fortran, dtype


def _key(path: Path, member: zipfile.ZipInfo) -> str:
    """Sizes and checksums as the ZIP's directory has them, so nothing is read."""
    stat = path.stat()
    return (
        f"npz-{stat.st_size:x}-{stat.st_mtime_ns:x}-{member.CRC:08x}-"
        f"{member.file_size:x}-{member.header_offset:x}"
    )


def _unpacking(path: Path, member: zipfile.ZipInfo) -> cache.Fill:
    def fill(sink: cache.Sink) -> None:
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
    """A damaged or encrypted ZIP file raises almost anything: DataError."""
    try:
        yield
    except Exception as error:
        raise DataError(f"{path} is damaged: {error}.") from None
