"""One worker that torchrun has started: `python -m samestep.worker train|resume ...`.

torchrun starts the same command on every machine, once per worker, and again after a
failure or when a machine joins. Each time the workers

    1. find each other (`samestep.elastic.roster`)
    2. compare what decides bits, and which states they hold
       (`samestep.elastic.agreement`)
    3. give the newest state to the machines that lack it (`samestep.elastic.transfer`)
    4. train; the first worker of each machine, its leader, keeps the run there

so every machine has everything, and any that is left can go on.
"""

import faulthandler
import os
import signal
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import click
from torch.distributed import DistError
from torch.distributed.elastic.multiprocessing.errors import get_error_handler

from samestep import exits
from samestep.asking import requested
from samestep.board import Board
from samestep.compilercache import own_directory
from samestep.elastic import generation, leading
from samestep.elastic.comparing import Request
from samestep.elastic.meeting import Meeting
from samestep.elastic.roster import POLL_SECONDS
from samestep.elastic.watcher import Watcher
from samestep.errors import Interrupted, PeerLost, PlacementError
from samestep.options import (
    interface_option,
    own_options,
    placement_options,
    recipe_options,
    report_option,
    tracker_option,
)
from samestep.place import Place
from samestep.placement import Placement
from samestep.probing import Witness
from samestep.worker import build_replay


STARTED = time.monotonic()
LINGER_SECONDS = 2.0
"""Who has lost the others waits so long for torchrun: if it is about to start the
workers again anyway, as when another machine's failed, this one's end is no failure."""


@click.group()
def workers() -> None:
    """What torchrun starts; people use the command `samestep`."""


@workers.command()
@click.argument("recipe", required=False)
@placement_options
@recipe_options
@click.option("--out", type=click.Path(path_type=Path))
@click.option("--set", "assignments", multiple=True)
@own_options
@tracker_option
@report_option
@interface_option
def train(
    recipe: str | None,
    out: Path | None,
    interface: str | None,
    trackers: tuple[str, ...],
    with_report: bool,
    **options: Any,
) -> None:
    """A recipe, from the beginning or from where this job has come to."""
    asked, parts = requested(recipe, options)
    run = out or _default_directory(asked.name)
    placement = Placement.model_validate(options | {"out": run})
    take_part(Request(run, asked, parts, placement, interface, trackers, with_report))


@workers.command()
@click.argument("run", type=click.Path(path_type=Path))
@placement_options
@click.option("--epochs", type=int)
@click.option("--accept-other-bits", is_flag=True)
@own_options
@tracker_option
@report_option
@interface_option
def resume(
    run: Path,
    epochs: int | None,
    accept_other_bits: bool,
    model: str | None,
    data: str | None,
    loss: str | None,
    interface: str | None,
    trackers: tuple[str, ...],
    with_report: bool,
    **options: Any,
) -> None:
    """A run that at least one of the machines has."""
    parts = {"model": model, "data": data, "loss": loss}
    named = {part: name for part, name in parts.items() if name is not None}
    placement = Placement.model_validate(options | {"out": run})
    take_part(
        Request(
            run,
            None,
            named,
            placement,
            interface,
            trackers,
            with_report,
            epochs,
            accept_other_bits,
        )
    )


def main() -> NoReturn:
    """Exit codes as those of the command line.

    Skips what Python does at its end: a process group that has lost a peer may wait
    for it there.
    """
    code: Any = 1
    try:
        with own_directory():
            exits.run(workers)
    except SystemExit as end:
        code = end.code
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def take_part(request: Request) -> None:
    """One worker of one generation, from its start to its end.

    Raises SamestepError, and Interrupted when it was stopped or has lost the others.
    """
    faulthandler.register(signal.SIGUSR2, all_threads=True)
    place = Place.from_environment()
    # To be forked while there is one thread, before it is known whether it is needed.
    witness = Witness.start(build_replay, ()) if place.rank == 0 else None
    watcher = Watcher()
    watcher.start()
    with _recorded(), _lingering(watcher):
        _check(request)
        meeting = Meeting.join(place, lambda: _pause(watcher), witness)
        if place.is_leader:
            leading.lead(request, meeting, watcher, STARTED)
        else:
            _follow(meeting, watcher)


def _check(request: Request) -> None:
    """Raises PlacementError."""
    placement = request.placement
    if placement.workers != "auto":
        raise PlacementError(
            "Under torchrun, its `--nproc-per-node` decides how many workers there "
            f"are; received `--workers {placement.workers}`. Leave it out."
        )
    for name in ("profile", "evict_slower_than", "min_workers"):
        if getattr(placement, name):
            raise PlacementError(
                f"`--{name.replace('_', '-')}` needs samestep's own supervisor, which "
                "does not run under torchrun. Leave it out, or use `samestep train` on "
                "one machine."
            )


def _follow(meeting: Meeting, watcher: Watcher) -> None:
    """A worker whose leader keeps the run."""
    briefing, fds = meeting.briefing()
    os.environ.update(briefing["environment"])
    board = Board(fds["board"], meeting.place.local_rank)
    channel = generation.Here(briefing["job"], meeting.place.rank, lambda _: None)
    if not generation.train_here(channel, meeting, fds, board, watcher):
        raise Interrupted("stopped with the others", watcher.stop.exit_code)


def _default_directory(name: str) -> Path:
    """Of the job's name, since all starts of all machines must find it again."""
    job = os.environ.get("TORCHELASTIC_RUN_ID", "none")
    if job == "none" or not job.replace("-", "").replace("_", "").isalnum():
        raise PlacementError(
            "All starts of a job use one directory: give it with `--out`, or name the "
            f"job for torchrun, `--rdzv-id NAME`; its name is `{job}`."
        )
    return Path("runs") / f"{name}-{job}"


def _pause(watcher: Watcher) -> None:
    time.sleep(POLL_SECONDS)
    if watcher.stop.number is not None:
        raise Interrupted("stopped before the training began", watcher.stop.exit_code)


@contextmanager
def _recorded() -> Iterator[None]:
    """torchrun shows the first failure of all workers from their error files."""
    handler = get_error_handler()
    handler.initialize()
    try:
        yield
    except BaseException as error:
        handler.record_exception(error)
        raise


@contextmanager
def _lingering(watcher: Watcher) -> Iterator[None]:
    """Ends by the signal that torchrun may be about to send."""
    try:
        yield
    except (Interrupted, PeerLost, DistError) as error:
        watcher.wait_for_signal(LINGER_SECONDS)
        raise Interrupted(str(error), watcher.stop.exit_code) from error
