"""What workers print, where the directory of their logs does not stay."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from samestep.errors import SamestepError


MOST_BYTES = 20_000
"""Of the end of a log, that an error keeps."""


@contextmanager
def temporary_logs() -> Iterator[Path]:
    """A directory for logs, below $TMPDIR; a failing worker's goes into its error."""
    with tempfile.TemporaryDirectory(prefix="samestep-") as directory:
        try:
            yield Path(directory)
        except SamestepError as error:
            take_log(error)
            raise


def take_log(error: SamestepError) -> None:
    """The end of a worker's log becomes the error's `output`: the file will be gone."""
    details = dict(error.details)
    log = details.pop("log", None)
    if log is not None and Path(log).is_file():
        content = Path(log).read_bytes()[-MOST_BYTES:]
        details["output"] = content.decode(errors="replace")
    error.details = details
