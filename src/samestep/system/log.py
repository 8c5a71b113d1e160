"""The logger `samestep`: notices, warnings and lines of progress of a training.

A Python caller redirects or silences it like any other logger:

    logging.getLogger("samestep").setLevel(logging.ERROR)  # no notices, no warnings
    logging.basicConfig(level=logging.INFO, filename="training.log")  # into a file

Where logging has not been configured, as on the command line, records are printed on
stderr. The live table and the progress bar on a terminal do not go through the logger;
see `samestep.output.console.SilentView`.
"""

import logging
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from samestep.system.terminal import clean


class _Clean(logging.Filter):
    """Escapes control characters, whichever handler shows the record."""

    def filter(self, record: logging.LogRecord) -> bool:
        record.msg, record.args = clean(record.getMessage()), None
        return True


logger = logging.getLogger("samestep")
logger.addFilter(_Clean())


class _StderrHandler(logging.Handler):
    """Prints records on stderr, warnings with `warning: ` before them."""

    users = 0
    """Trainings that print through it: several threads may train."""
    level_before = logging.NOTSET

    def emit(self, record: logging.LogRecord) -> None:
        prefix = "warning: " if record.levelno == logging.WARNING else ""
        # Looked up for each record: a live table replaces sys.stderr while it is shown,
        # so that lines appear above it.
        print(prefix + record.getMessage(), file=sys.stderr, flush=True)


_handler, _lock = _StderrHandler(), threading.Lock()


@contextmanager
def shown_on_stderr() -> Iterator[None]:
    """Print the logger's records on stderr, unless the caller has configured logging.

    The level becomes INFO, unless the caller has set one.
    """
    with _lock:
        is_ours = _handler in logger.handlers or not logger.hasHandlers()
        if is_ours:
            _begin()
    try:
        yield
    finally:
        if is_ours:
            with _lock:
                _end()


def _begin() -> None:
    if not _handler.users:
        _handler.level_before = logger.level
        logger.addHandler(_handler)
        logger.setLevel(logger.level or logging.INFO)
    _handler.users += 1


def _end() -> None:
    _handler.users -= 1
    if not _handler.users:
        logger.removeHandler(_handler)
        logger.setLevel(_handler.level_before)
