"""How every benchmark begins and ends: nothing that it made outlives it.

A library of the scripts here, not one of them.
"""

import ctypes
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import psutil
from quota import remove_all

from samestep.errors import Interrupted


ENDING = (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)
PR_SET_CHILD_SUBREAPER = 36
"""Orphans below this process become its children, so that it finds all of them."""
DEADLINE = 20.0


def run(main: Callable[[], None]) -> None:
    """Call `main`, then end all processes below, remove temporary files and cgroups.

    SIGTERM, SIGHUP and SIGINT do the same at once, wherever `main` is: to leave its
    `with` blocks one by one could wait for ever, since Ctrl-C has ended processes in
    another order than they expect. Temporary files are those of `tempfile` and of other
    programs that mind TMPDIR.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, ENDING)
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1)
    directory = Path(tempfile.mkdtemp(prefix="samestep-benchmark-"))
    os.environ["TMPDIR"] = tempfile.tempdir = str(directory)
    for number in ENDING:
        signal.signal(number, partial(_end, directory))
    signal.pthread_sigmask(signal.SIG_UNBLOCK, ENDING)
    try:
        main()
    except Interrupted as stopped:  # by a signal in the midst of a training
        raise SystemExit(stopped.exit_code) from None
    finally:
        _clean(directory)


def _end(directory: Path, number: int, _: Any) -> None:
    """Handle a signal. No exception, which a callback or `__del__` could swallow."""
    for other in ENDING:
        signal.signal(other, signal.SIG_IGN)
    _clean(directory)
    sys.stdout.flush()
    os._exit(128 + number)


def _clean(directory: Path) -> None:
    end = time.monotonic() + DEADLINE
    while (below := psutil.Process().children(recursive=True)) and (
        time.monotonic() < end
    ):
        for process in below:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(below, timeout=1.0)
    remove_all()
    shutil.rmtree(directory, ignore_errors=True)
