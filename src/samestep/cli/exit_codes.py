"""The exit code for every way in which a command can end."""

import signal
import sys
import warnings
from pathlib import Path
from typing import Any, NoReturn

import click

from samestep.config.renames import new_flags
from samestep.errors import Interrupted, OldNameWarning, SamestepError, WorkerFailed
from samestep.system.log import logger, shown_on_stderr
from samestep.system.terminal import echo


class Terminated(BaseException):
    """SIGTERM was received."""


def run(commands: click.Group) -> NoReturn:
    """Run the command in sys.argv. Raises SystemExit with the exit code."""
    signal.signal(signal.SIGTERM, _terminate)
    _show_old_names_in_one_line()
    try:
        with shown_on_stderr():
            commands.main(new_flags(sys.argv[1:]), standalone_mode=False)
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
        if shown and _needs_traceback(error):
            echo(shown, err=True, nl=False)
        _fail(f"{error}{_where(error)}", error.exit_code)
    sys.exit(0)


def _show_old_names_in_one_line() -> None:
    """Show OldNameWarning like other warnings, without a line of source code."""
    show = warnings.showwarning

    def show_warning(message: Warning | str, *rest: Any, **named: Any) -> None:
        if isinstance(message, OldNameWarning):
            logger.warning("%s", message)
        else:
            show(message, *rest, **named)

    warnings.showwarning = show_warning


def _where(error: SamestepError) -> str:
    """Return where the log is, if it still exists: some commands keep none."""
    log = error.details.get("log")
    return f" (log: {log})" if log and Path(log).exists() else ""


def _needs_traceback(error: SamestepError) -> bool:
    """Return whether the worker's traceback says more than the message."""
    leads_through_user_code = hasattr(error, "__notes__")
    return leads_through_user_code or isinstance(error, WorkerFailed)


def _terminate(*_: object) -> NoReturn:
    raise Terminated


def _fail(message: str, exit_code: int) -> NoReturn:
    echo(f"Error: {message}", err=True)
    sys.exit(exit_code)
