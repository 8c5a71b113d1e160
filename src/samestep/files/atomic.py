"""Writes files completely or not at all.

Each function first asks `fault_injection` whether the disk is to be full: a test can so
make every write of the supervisor fail, as the kernel would, in any process.
"""

import os
from pathlib import Path

from samestep.files import untrusted
from samestep.system.fault_injection import check_disk


def write(path: Path, content: bytes) -> None:
    """Write a temporary file, flush it to the disk, rename it. Raises OSError."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write_through(temporary, content)
        temporary.replace(path)
        flush_directory(path.parent)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


def write_through(path: Path, content: bytes) -> None:
    """Write a new file and flush it to the disk; an old one of this name is removed.

    Raises OSError.
    """
    check_disk()
    path.unlink(missing_ok=True)
    with path.open("xb") as file:  # "x" follows no symbolic link
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def append(path: Path, content: bytes) -> None:
    """Append all of the content or nothing; links are refused. Raises OSError.

    See `untrusted.open_to_append`.
    """
    check_disk()
    fd = untrusted.open_to_append(path, path.parent)
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
    """Make renames in the directory durable. Raises OSError."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
