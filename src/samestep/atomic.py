"""Files and directories that are there whole or not at all."""

import os
from pathlib import Path

from samestep.faults import check_disk


def write(path: Path, content: bytes) -> None:
    """Under a temporary name, flushed to the disk, then renamed. Raises OSError."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write_through(temporary, content)
        temporary.replace(path)
        flush_directory(path.parent)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


def write_through(path: Path, content: bytes) -> None:
    """Returns when the disk has it. Raises OSError."""
    check_disk()
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def append(path: Path, content: bytes) -> None:
    """All of it or nothing. Raises OSError."""
    check_disk()
    fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        size = os.fstat(fd).st_size
        try:
            written = 0
            while written < len(content):
                written += os.write(fd, content[written:])
        except OSError:
            os.ftruncate(fd, size)
            raise
    finally:
        os.close(fd)


def flush_directory(path: Path) -> None:
    """Makes renames in it durable. Raises OSError."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
