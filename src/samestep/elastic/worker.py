"""One worker that torchrun has started: `python -m samestep.worker train|resume ...`.

torchrun starts the same command on every machine, once per worker, and again after a
failure or when a machine joins. Each time, the workers

    1. find each other (`samestep.elastic.membership`)
    2. compare what decides bits, and which states they hold
       (`samestep.elastic.consensus`)
    3. give the newest state to the machines that lack it (`elastic.state_transfer`)
    4. train; the first worker of each machine, its leader, keeps the run there

so every machine has everything, and any of them can go on alone.
"""

import faulthandler
import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager

from torch.distributed import DistError
from torch.distributed.elastic.multiprocessing.errors import get_error_handler

from samestep.config.placement import Placement
from samestep.core.topology import Topology
from samestep.elastic import attempt, briefing
from samestep.elastic.gathering import Meeting
from samestep.elastic.leader import Leader
from samestep.elastic.membership import POLL_SECONDS
from samestep.elastic.preflight import Request, option
from samestep.elastic.watchdog import Watcher, wake_workers
from samestep.errors import Interrupted, PeerLost, PlacementError, WorkerLate
from samestep.system.heartbeat import Heartbeat
from samestep.training.worker import build_replay
from samestep.verification.probe import Witness


SUPERVISED = ("profile", "drop_stragglers_below", "min_workers")
"""Fields of the placement that need samestep's supervisor."""
STOPPED_SECONDS, LOST_SECONDS = 2.0, 6.0
"""A worker that has stopped with the others, or has lost them, waits so long for a
signal of torchrun. If torchrun is restarting all workers anyway, since another one
failed or a machine is lost, which it notices after `rendezvous.KEEP_ALIVE_SECONDS`,
this one has not failed."""


def take_part(request: Request) -> None:
    """Run one worker of one generation, from its start to its end.

    Raises SamestepError, and Interrupted if it was stopped or has lost the others.
    """
    started = time.monotonic()
    faulthandler.register(signal.SIGUSR2, all_threads=True)
    topology = Topology.from_environment()
    # A fork is safe only while there is one thread, so the witness is forked before
    # it is known whether the training is probed.
    witness = Witness.start(build_replay, ()) if topology.rank == 0 else None
    watcher = Watcher()
    watcher.start()
    with _recorded(), _lingering(watcher):
        _check(request)
        meeting = Meeting.join(topology, lambda: _pause(watcher), witness)
        if topology.is_leader:
            Leader(request, meeting, watcher, started).lead()
        else:
            _follow(meeting, watcher)


def _check(request: Request) -> None:
    """Refuse options that need samestep's supervisor. Raises PlacementError."""
    placement = request.placement
    if placement.workers != "auto":
        raise PlacementError(
            "Under torchrun, its `--nproc-per-node` decides how many workers there "
            f"are; received `--workers {placement.workers}`. Leave it out."
        )
    for name in SUPERVISED:
        if getattr(placement, name) != Placement.model_fields[name].default:
            raise PlacementError(
                f"`{option(name)}` needs samestep's own supervisor, which does not run "
                "under torchrun. Leave it out, or use `samestep train` on one machine."
            )


def _follow(meeting: Meeting, watcher: Watcher) -> None:
    """Train under the leader of this machine, which keeps the run."""
    message, fds = briefing.take(meeting)
    os.environ.update(message.environment)
    heartbeat = Heartbeat(fds["heartbeat"], meeting.topology.local_rank)
    channel = attempt.InProcessChannel(message.job)
    if not attempt.train_here(channel, meeting, fds, heartbeat, watcher):
        raise Interrupted("stopped with the others", watcher.stop.exit_code)


def _pause(watcher: Watcher) -> None:
    time.sleep(POLL_SECONDS)
    if watcher.stop.number is not None:
        raise Interrupted("stopped before the training began", watcher.stop.exit_code)


@contextmanager
def _recorded() -> Iterator[None]:
    """Write an exception to the error file of which torchrun shows the first."""
    handler = get_error_handler()
    handler.initialize()
    try:
        yield
    except BaseException as error:
        handler.record_exception(error)
        raise


@contextmanager
def _lingering(watcher: Watcher) -> Iterator[None]:
    """After the loss of a peer, wait for the signal that torchrun may send."""
    try:
        yield
    except (Interrupted, PeerLost, DistError) as error:
        in_order = isinstance(error, Interrupted) and error.__cause__ is None
        if not in_order:
            wake_workers(os.getppid())
        # A worker that was late has been waited for long enough.
        is_soon = in_order or isinstance(error.__cause__, WorkerLate)
        watcher.wait_for_signal(STOPPED_SECONDS if is_soon else LOST_SECONDS)
        raise Interrupted(str(error), watcher.stop.exit_code) from error
