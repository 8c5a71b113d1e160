"""Workers' logs in commands that keep no run directory."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from samestep.errors import SamestepError


MOST_BYTES = 20_000
"""How much of the end of a log an error keeps."""


@contextmanager
def temporary_logs() -> Iterator[Path]:
    """Yield a directory for logs, below $TMPDIR.

    A SamestepError takes the failing worker's log with it, see `take_log`.
    """
    with tempfile.TemporaryDirectory(prefix="samestep-") as directory:
        try:
            yield Path(directory)
        except SamestepError as error:
            take_log(error)
            raise


def take_log(error: SamestepError) -> None:
    """Copy the end of a worker's log into the error, before the file is deleted."""
    details = dict(error.details)
    log = details.pop("log", None)
    if log is not None and Path(log).is_file():
        content = Path(log).read_bytes()[-MOST_BYTES:]
        details["output"] = content.decode(errors="replace")
    error.details = details
