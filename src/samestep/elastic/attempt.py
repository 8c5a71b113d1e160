"""One attempt of a training, in a process that torchrun has started."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from samestep.elastic.gathering import Meeting
from samestep.elastic.node_state import Held, SnapshotDirectory, StateInfo
from samestep.elastic.watchdog import Watcher
from samestep.errors import Interrupted, PeerLost, SamestepError, WorkerLate
from samestep.messages.job import Job, TrainingJob
from samestep.messages.training import (
    GenerationFailed,
    Message,
    SnapshotSaved,
    Started,
)
from samestep.state import frozen
from samestep.state.layout import Layout
from samestep.state.snapshot import Snapshots, State
from samestep.supervisor import launch
from samestep.supervisor.recovery import check_same, of_step
from samestep.system.heartbeat import Heartbeat
from samestep.system.signals import Stop
from samestep.training import worker


LOST = (PeerLost, WorkerLate)
"""Errors of others: this machine can continue once torchrun has re-formed the group."""


class InProcessChannel:
    """The channel of a worker whose leader is in the same process, or that has none."""

    def __init__(
        self, job: TrainingJob, listen: Callable[[Message], None] = lambda _: None
    ) -> None:
        self.job: Job = job
        self._listen = listen

    def watch(self) -> None:
        """Do nothing: `elastic/watchdog.py` watches the parent process."""

    def send(self, message: Message) -> None:
        """Pass a message on; only the leader's process does something with it."""
        self._listen(message)


def train_here(
    channel: InProcessChannel,
    meeting: Meeting,
    fds: dict[str, int],
    heartbeat: Heartbeat,
    watcher: Watcher,
) -> bool:
    """All workers: train; return whether it was finished rather than stopped.

    Raises SamestepError, or Interrupted if others were lost. Afterwards the main thread
    ends the process, not the watchdog.
    """
    rank = meeting.topology.rank
    watcher.ask = heartbeat.request_stop
    if watcher.stop.number is not None:
        heartbeat.request_stop()
    try:
        where = meeting.topology, fds, heartbeat, meeting.workers_store
        return worker.run(channel, *where, meeting.witness)
    except Exception as error:
        failure = launch.exception(worker.failure(error), rank)
        if isinstance(failure, LOST):
            raise Interrupted(str(failure), watcher.stop.exit_code) from error
        raise failure from error
    finally:
        watcher.ending.acquire()


@dataclass
class Generation:
    """The training in this process, as a `Session` sees it."""

    meeting: Meeting
    watcher: Watcher
    job: TrainingJob
    fds: dict[str, int]
    conditions: Mapping[str, str]
    """Everything that decides bits besides the recipe."""
    about: Callable[[Layout, Started], StateInfo]
    """Makes the description of snapshots from the layout and the message `Started`."""
    directory: SnapshotDirectory
    held: Held | None
    """The state to continue from."""
    listen: Callable[[Message], None] = lambda _: None
    offer: Callable[[Callable[[], State | None], Layout, int], None] = lambda *_: None
    layout: Layout | None = None
    is_finished: bool = False
    _snapshots: Snapshots | None = None

    @property
    def stop(self) -> Stop:
        """The request to stop, if there was one."""
        return self.watcher.stop

    @property
    def state(self) -> State | None:
        """The newest snapshot of this machine."""
        return self._snapshots.newest() if self._snapshots else None

    def build(self) -> dict[str, str]:
        """Return everything that decides bits besides the recipe."""
        return dict(self.conditions)

    def run(self) -> State | None:
        """Train until the end or a request to stop; return the newest state."""
        heartbeat = Heartbeat(self.fds["board"], self.meeting.topology.local_rank)
        rank = self.meeting.topology.rank
        channel = InProcessChannel(self.job, self._receive)
        try:
            self.is_finished = train_here(
                channel, self.meeting, self.fds, heartbeat, self.watcher
            )
        except (SamestepError, Interrupted) as error:
            failed = GenerationFailed(error=str(error), worker=rank, step=self._step)
            self.listen(failed)
            raise
        return self.state

    @property
    def _step(self) -> int:
        state = self.state
        return state.step if state else 0

    def _receive(self, message: Message) -> None:
        if isinstance(message, Started):
            self._start(message)
        self.listen(message)
        if isinstance(message, SnapshotSaved):
            snapshots, layout = self._snapshots, self.layout
            assert snapshots is not None
            assert layout is not None
            slot, step = message.slot, message.step
            self.offer(lambda: of_step(snapshots.read(slot), step), layout, step)

    def _start(self, message: Started) -> None:
        layout = Layout.model_validate(message.layout)
        if self.held is not None:
            check_same(self.held.layout, layout)
        kept = frozen.read(self.fds["constants"])
        workers = self.meeting.topology.local_workers
        self._snapshots = Snapshots(self.fds["snapshots"], layout, workers, kept)
        self.layout = layout
        self.directory.describe(self.about(layout, message))
