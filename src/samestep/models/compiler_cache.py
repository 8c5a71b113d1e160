"""Where torch's compiler keeps its products, which it loads and runs later.

Its own choice is a directory in the temporary one, under a name that anybody can make
first, and it makes that as soon as DistributedDataParallel is imported.
"""

import os
import tempfile
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path

from samestep.system import cache


VARIABLE = "TORCHINDUCTOR_CACHE_DIR"


@contextmanager
def own_directory() -> Iterator[None]:
    """In this process and those that it starts: ours, unless the user has named one.

    Without a writable cache it is temporary, and is removed at the end.
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
    """In the cache of this user; None if it cannot be written."""
    try:
        path = cache.directory() / "compiled"
        path.mkdir(parents=True, exist_ok=True)
    except cache.UNWRITABLE:
        return None
    return path if os.access(path, os.W_OK) else None
