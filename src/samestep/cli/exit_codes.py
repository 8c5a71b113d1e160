"""Every way in which a command can end, and its exit code."""

import signal
import sys
import warnings
from pathlib import Path
from typing import Any, NoReturn

import click

from samestep.errors import (
    Interrupted,
    OldNameWarning,
    SamestepError,
    UsageError,
    WorkerFailed,
)
from samestep.system.terminal import echo


class Terminated(BaseException):
    """SIGTERM was received."""


def run(commands: click.Group) -> NoReturn:
    """The command that was asked for. Raises SystemExit with the exit code."""
    signal.signal(signal.SIGTERM, _terminate)
    _show_old_names_in_one_line()
    try:
        commands.main(standalone_mode=False)
    except click.exceptions.Abort:
        _fail("interrupted", 130)
    except Terminated:
        _fail("terminated", 143)
    except Interrupted as error:
        _fail(str(error), error.exit_code)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except SamestepError as error:
        shown = error.details.get("traceback") or error.details.get("output")
        if shown and not _explains_itself(error):
            echo(shown, err=True, nl=False)
        _fail(f"{error}{_where(error)}", error.exit_code)
    sys.exit(0)


def _show_old_names_in_one_line() -> None:
    """Show these warnings like other notices: without a line of our code."""
    show = warnings.showwarning

    def show_warning(message: Warning | str, *rest: Any, **named: Any) -> None:
        if isinstance(message, OldNameWarning):
            echo(f"warning: {message}", err=True)
        else:
            show(message, *rest, **named)

    warnings.showwarning = show_warning


def _where(error: SamestepError) -> str:
    """The log, if it is still there: some commands keep none."""
    log = error.details.get("log")
    return f" (log: {log})" if log and Path(log).exists() else ""


def _explains_itself(error: SamestepError) -> bool:
    """A worker's own SamestepError says what to do; other errors need a traceback."""
    if getattr(error, "__notes__", None):  # frames of the user's own code
        return False
    return isinstance(error, UsageError) or not isinstance(error, WorkerFailed)


def _terminate(*_: object) -> NoReturn:
    raise Terminated


def _fail(message: str, exit_code: int) -> NoReturn:
    echo(f"Error: {message}", err=True)
    sys.exit(exit_code)
