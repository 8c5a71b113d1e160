"""The commands that torchrun starts: `python -m samestep.worker train|resume ...`."""

import os
import sys
import traceback
import warnings
from pathlib import Path
from typing import Any, NoReturn

import click

from samestep.cli import exit_codes
from samestep.cli.options import interface_option, resume_options, train_options
from samestep.config.placement import Placement
from samestep.elastic.nodes import JOB
from samestep.elastic.preflight import Request
from samestep.elastic.worker import take_part
from samestep.errors import OldNameWarning, PlacementError
from samestep.models.compiling import own_directory
from samestep.user_code.arguments import parts_of, requested


@click.group()
def workers() -> None:
    """Run as one worker of torchrun; people use the command `samestep`."""


@workers.command()
@click.argument("recipe", required=False)
@train_options
@interface_option
def train(
    recipe: str | None,
    out: Path | None,
    interface: str | None,
    callbacks: tuple[str, ...],
    trackers: tuple[str, ...],
    with_report: bool,
    **options: Any,
) -> None:
    """Train a recipe from the beginning, or continue where this job left off."""
    asked, parts = requested(recipe, options)
    run = out or _default_directory(asked.name)
    placement = Placement.model_validate(options | {"out": run})
    request = Request(
        run, asked, parts, placement, interface, callbacks, trackers, with_report
    )
    take_part(request)


@workers.command()
@click.argument("run", type=click.Path(path_type=Path))
@resume_options
@interface_option
def resume(
    run: Path,
    epochs: int | None,
    allow_different_numerics: bool,
    interface: str | None,
    callbacks: tuple[str, ...],
    trackers: tuple[str, ...],
    with_report: bool,
    **options: Any,
) -> None:
    """Continue a run that at least one of the machines has."""
    request = Request(
        run=run,
        recipe=None,
        parts=parts_of(options),
        placement=Placement.model_validate(options | {"out": run}),
        interface=interface,
        callbacks=callbacks,
        trackers=trackers,
        with_report=with_report,
        epochs=epochs,
        allow_different_numerics=allow_different_numerics,
    )
    take_part(request)


def main() -> NoReturn:
    """Run the command, and end with the exit codes of the command line."""
    code: Any = 1
    if JOB in os.environ or os.environ.get("LOCAL_RANK") != "0":  # warned already
        warnings.simplefilter("ignore", OldNameWarning)
    try:
        with own_directory():
            exit_codes.run(workers)
    except SystemExit as end:
        code = end.code
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        # Without the usual clean-up: a process group that has lost a peer may wait for
        # it there.
        os._exit(code)


def _default_directory(name: str) -> Path:
    """Return a name that all starts of the job on all machines share.

    Raises PlacementError if the job has no name.
    """
    job = os.environ.get("TORCHELASTIC_RUN_ID", "none")
    if job == "none" or not job.replace("-", "").replace("_", "").isalnum():
        raise PlacementError(
            "All starts of a job use one directory: give it with `--out`, or name the "
            f"job for torchrun, `--rdzv-id NAME`; its name is `{job}`."
        )
    return Path("runs") / f"{name}-{job}"
