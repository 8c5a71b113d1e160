"""Files and directories that are there whole or not at all."""

import os
from pathlib import Path

from samestep.system import untrusted_files
from samestep.system.fault_injection import check_disk


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
    """A new file: what has the name already goes. Returns when the disk has it.

    Raises OSError.
    """
    check_disk()
    path.unlink(missing_ok=True)
    with path.open("xb") as file:  # which follows no link
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def append(path: Path, content: bytes) -> None:
    """All of it or nothing, as `files.open_to_append` has it. Raises OSError."""
    check_disk()
    fd = untrusted_files.open_to_append(path, path.parent)
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
