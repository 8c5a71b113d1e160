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
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from samestep.errors import DataError
from samestep.files import untrusted


Bytes = NDArray[np.uint8]
VARIABLE = "SAMESTEP_CACHE"
DIGEST_BYTES = 32
CHUNK = 1 << 20

UNWRITABLE = (OSError, RuntimeError)  # Path.home() raises the latter if there is none


Fill = Callable[[BinaryIO], None]
"""A function that writes the content to a file."""


def directory() -> Path:
    """Return this user's cache directory. Raises RuntimeError without a home."""
    chosen = os.environ.get(VARIABLE)
    if chosen:
        return Path(chosen)
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "samestep"


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
        return (
            f"the data cache cannot be written ({error}): every worker unpacks its "
            f"own copy; set {VARIABLE} to a writable directory"
        )
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


def _write(path: Path, fill: Fill) -> None:
    """Write atomically: another run may be writing or mapping the same file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("w+b") as file:
            fill(file)
            file.seek(0)
            file.write(hashlib.file_digest(file, "sha256").digest())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _is_intact(path: Path) -> bool:
    if not path.exists() or path.stat().st_size < DIGEST_BYTES:
        return False
    content = np.memmap(path, np.uint8, "r")
    digest = hashlib.sha256(content[:-DIGEST_BYTES].data).digest()
    return digest == content[-DIGEST_BYTES:].tobytes()
