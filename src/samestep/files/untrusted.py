"""Opens files that someone else may have made: only regular files, without blocking.

A run, a model file or a data set from elsewhere may hold links that lead out of it,
pipes that block for ever, JSON that is nested too deep, or files larger than the
memory. Here all of these raise OSError or ValueError, which callers turn into a
message.
"""

import errno
import json
import math
import os
import stat
from pathlib import Path
from typing import Any

from samestep.errors import RunError


MOST_BYTES = 4 << 30
"""The largest file that is read into memory as a whole."""
MOST_DEPTH = 64
"""The deepest nesting of JSON; samestep writes 8 levels at most."""
KINDS = {
    stat.S_IFLNK: "a symbolic link",
    stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFDIR: "a directory",
}


def check_regular(path: Path) -> None:
    """Check that a path, or what a link leads to, is a regular file.

    It is not opened. Raises OSError.
    """
    _check_name(path)
    _check_kind(path.stat().st_mode)


def open_regular(path: Path) -> int:
    """Open a regular file without blocking; return the descriptor. Raises OSError."""
    _check_name(path)
    return _checked(_open(path, os.O_RDONLY | os.O_NONBLOCK))


def open_to_append(path: Path, within: Path) -> int:
    """Open or create a file below `within`, following no link below it.

    A file with a second hard link is refused, since others could read it there. Raises
    OSError.
    """
    flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NONBLOCK
    *directories, name = path.relative_to(within).parts
    fd = _open(within, os.O_RDONLY | os.O_DIRECTORY)
    for directory in directories:
        fd = _open_in(fd, directory, os.O_RDONLY | os.O_DIRECTORY)
    return _checked(_open_in(fd, name, flags), most_links=1)


def read_bytes(path: Path, most: int = MOST_BYTES) -> bytes:
    """Return the whole content. Raises OSError."""
    with os.fdopen(open_regular(path), "rb") as file:
        size = os.fstat(file.fileno()).st_size
        if size > most:
            why = f"it has {size:,} bytes, more than {most:,}"
            raise OSError(errno.EFBIG, why, str(path))
        return file.read()


def read_text(path: Path, errors: str = "strict", most: int = MOST_BYTES) -> str:
    """Return the content as UTF-8, with \\n for every kind of line end.

    Raises OSError, UnicodeDecodeError.
    """
    text = read_bytes(path, most).decode("utf-8", errors)
    return text.replace("\r\n", "\n").replace("\r", "\n")


def parse_json(text: str | bytes) -> Any:
    """Parse JSON; raise ValueError for anything wrong, including too deep nesting."""
    try:
        content = json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deep") from None
    check_depth(content)
    return content


def check_depth(value: Any) -> None:
    """Raise ValueError if dictionaries and lists are nested too deep."""
    level = [value]
    for _ in range(MOST_DEPTH):
        level = [part for outer in level for part in _parts(outer)]
        if not level:
            return
    raise ValueError(f"it is nested more than {MOST_DEPTH} deep")


def check_parts(run: Path) -> None:
    """Raise RunError if a run holds anything but files and directories.

    A link could make samestep write elsewhere, and a pipe could block it. To be called
    before a run is read or written.
    """

    def refuse(error: OSError) -> None:
        if not isinstance(error, FileNotFoundError):  # removed by a training
            raise RunError(f"{error.filename} cannot be read: {error.strerror}.")

    for place, directories, names in os.walk(run, onerror=refuse):
        for name in (*directories, *names):
            path = Path(place, name)
            try:
                mode = path.lstat().st_mode
            except FileNotFoundError:
                continue
            if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
                kind = KINDS.get(stat.S_IFMT(mode), "something else")
                raise RunError(
                    "A run holds only files and directories, so that nothing leads out "
                    f"of it; {path} is {kind}. Remove it, or replace it by a file."
                )


def _open(path: str | Path, flags: int, directory: int | None = None) -> int:
    return os.open(path, flags | os.O_CLOEXEC, 0o644, dir_fd=directory)


def _open_in(directory: int, name: str, flags: int) -> int:
    """Open a name in a directory, and close the directory. Raises OSError."""
    try:
        return _open(name, flags | os.O_NOFOLLOW, directory)
    except OSError as error:
        if error.errno == errno.ELOOP:
            error.strerror = "it is a symbolic link"
        raise
    finally:
        os.close(directory)


def _checked(fd: int, most_links: float = math.inf) -> int:
    """Return the descriptor; close it if that is no regular file. Raises OSError."""
    try:
        about = os.fstat(fd)
        _check_kind(about.st_mode)
        if about.st_nlink > most_links:
            raise OSError(errno.EMLINK, "it has a second name (a hard link)")
    except OSError:
        os.close(fd)
        raise
    return fd


def _check_name(path: Path) -> None:
    if "\0" in str(path):  # Python has a ValueError for it
        raise OSError(errno.EINVAL, "its name has a zero character")


def _check_kind(mode: int) -> None:
    if not stat.S_ISREG(mode):
        kind = KINDS.get(stat.S_IFMT(mode), "something else")
        raise OSError(errno.EINVAL, f"it is {kind}, not a file")


def _parts(value: Any) -> list[Any]:
    if isinstance(value, dict):
        return list(value.values())
    return value if isinstance(value, list) else []
