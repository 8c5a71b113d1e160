"""Where torch's compiler keeps its products, which it loads and runs later.

By default that is a directory below the temporary one, under a name that any user of
the machine can take first; torch makes it when DistributedDataParallel is imported.
"""

import os
import tempfile
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path

from samestep.files import cache


VARIABLE = "TORCHINDUCTOR_CACHE_DIR"


@contextmanager
def own_directory() -> Iterator[None]:
    """Use a directory in our cache, in this process and those that it starts.

    One that the user has named stays. Without a writable cache it is temporary, and is
    removed at the end.
    """
    if VARIABLE in os.environ:
        yield
        return
    path = _lasting()
    with nullcontext(path) if path else _temporary() as directory:
        os.environ[VARIABLE] = str(directory)
        try:
            yield
        finally:
            del os.environ[VARIABLE]


def _temporary() -> AbstractContextManager[str]:
    return tempfile.TemporaryDirectory(prefix="samestep-")


def _lasting() -> Path | None:
    """Return a directory in this user's cache; None if it cannot be written."""
    try:
        path = cache.directory() / "compiled"
        path.mkdir(parents=True, exist_ok=True)
    except cache.UNWRITABLE:
        return None
    return path if os.access(path, os.W_OK) else None
