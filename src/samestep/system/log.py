"""The logger `samestep`: every notice, warning and line of progress goes through it.

A Python caller redirects or silences it like any other logger:

    logging.getLogger("samestep").setLevel(logging.ERROR)  # no notices, no warnings
    logging.basicConfig(level=logging.INFO, filename="training.log")  # into a file

Where logging has not been configured, as on the command line, records are printed on
stderr. Only the live table on a terminal does not go through the logger; see
`samestep.output.console.SilentView`.
"""

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from samestep.system.terminal import clean


logger = logging.getLogger("samestep")


class _StderrHandler(logging.Handler):
    """Prints records on stderr, warnings with `warning: ` before them."""

    def emit(self, record: logging.LogRecord) -> None:
        prefix = "warning: " if record.levelno == logging.WARNING else ""
        # Looked up for each record: a live table replaces sys.stderr while it is shown,
        # so that lines appear above it.
        print(clean(prefix + record.getMessage()), file=sys.stderr, flush=True)


@contextmanager
def shown_on_stderr() -> Iterator[None]:
    """Print the logger's records on stderr, unless the caller has configured logging.

    The level becomes INFO, unless the caller has set one.
    """
    if logger.hasHandlers():
        yield
        return
    handler, level = _StderrHandler(), logger.level
    logger.addHandler(handler)
    logger.setLevel(level or logging.INFO)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
