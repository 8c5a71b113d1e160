"""Unpacked and decoded data, kept on disk once per machine and mapped by every worker.

A file holds its content, followed by the SHA-256 of the content. The supervisor checks
it before the workers start, so a damaged file is replaced and never trained on. Without
a writable cache directory, every process makes its own copy in memory.
"""

import hashlib
import io
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import IO, Protocol

import numpy as np
from numpy.typing import NDArray

from samestep.errors import DataError
from samestep.files import untrusted


Bytes = NDArray[np.uint8]
VARIABLE = "SAMESTEP_CACHE"
DIGEST_BYTES = 32
CHUNK = 1 << 20

UNWRITABLE = (OSError, RuntimeError)  # Path.home() raises the latter if there is none


class Sink(Protocol):
    """A file that content is written to."""

    def write(self, content: bytes, /) -> int: ...


Fill = Callable[[Sink], None]
"""A function that writes the content."""


def directory() -> Path:
    """Return this user's cache directory. Raises RuntimeError without a home."""
    chosen = os.environ.get(VARIABLE)
    if chosen:
        return Path(chosen)
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "samestep"


def notice(error: Exception) -> str:
    """Return the notice that the cache cannot be written."""
    return (
        f"the data cache cannot be written ({error}): every worker unpacks its "
        "own copy; set SAMESTEP_CACHE to a writable directory"
    )


def prepare(name: str, fill: Fill, size: int = 0) -> str | None:
    """Make sure, in the supervisor, that the file exists and is intact.

    Returns a notice if the cache cannot be written. `size` is the content's number of
    bytes, if known. Raises DataError if the disk has less room.
    """
    try:
        path = directory() / name
        if not _is_intact(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            _check_room(path.parent, size)
            _write(path, fill)
    except UNWRITABLE as error:
        return notice(error)
    return None


def read(name: str, fill: Fill) -> Bytes:
    """Return the content, mapped from the file that `prepare` has checked."""
    try:
        path = directory() / name
        if not path.exists():
            _write(path, fill)
        content: Bytes = np.memmap(path, np.uint8, "r")
        return np.asarray(content)[:-DIGEST_BYTES]
    except UNWRITABLE:
        memory = io.BytesIO()
        fill(memory)
        return np.frombuffer(memory.getbuffer(), np.uint8)


def _check_room(directory: Path, size: int) -> None:
    """Raise DataError if the disk is too small; small files can unpack to huge ones."""
    free = shutil.disk_usage(directory).free
    if size > free:
        raise DataError(
            f"Compressed data are unpacked into {directory}, which has room for "
            f"{free:,} bytes; these have {size:,}. Free some space, or set {VARIABLE} "
            "to a directory on another disk."
        )


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file's content. Raises OSError."""
    with os.fdopen(untrusted.open_regular(path), "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class _Hashed:
    """A file that computes the SHA-256 of its content while it is written."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self.digest = hashlib.sha256()

    def write(self, content: bytes, /) -> int:
        self.digest.update(content)
        return self._file.write(content)


def _write(path: Path, fill: Fill) -> None:
    """Write atomically: another run may be writing or mapping the same file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            hashed = _Hashed(file)
            fill(hashed)
            file.write(hashed.digest.digest())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _is_intact(path: Path) -> bool:
    if not path.exists() or path.stat().st_size < DIGEST_BYTES:
        return False
    digest, left = hashlib.sha256(), path.stat().st_size - DIGEST_BYTES
    with path.open("rb") as file:
        while left:
            piece = file.read(min(left, CHUNK))
            if not piece:  # another process has replaced a longer file meanwhile
                return False
            digest.update(piece)
            left -= len(piece)
        return file.read() == digest.digest()
