"""One attempt of a training, in a process that torchrun has started."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from samestep.elastic import node_state
from samestep.elastic.gathering import Meeting
from samestep.elastic.node_state import Held, StateInfo
from samestep.elastic.watchdog import Watcher
from samestep.errors import Interrupted, PeerLost, SamestepError, WorkerLate
from samestep.messages.job import Job, TrainingJob
from samestep.messages.training import (
    GenerationFailed,
    Message,
    SnapshotSaved,
    Started,
)
from samestep.state.layout import Layout
from samestep.state.snapshot import State
from samestep.supervisor import launch
from samestep.supervisor.snapshot_memory import OnSnapshot, SnapshotMemory
from samestep.system.heartbeat import Heartbeat
from samestep.system.signals import Stop
from samestep.training import worker


LOST = (PeerLost, WorkerLate)
"""Errors of others: this machine can continue once torchrun has re-formed the group."""


class InProcessChannel:
    """The channel of a worker under torchrun: only a leader listens to it."""

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
        if isinstance(error, SamestepError) and "wrong" in error.details:
            channel.send(error.details["wrong"])
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
    directory: Path
    """Where the snapshots of this generation are."""
    held: Held | None
    """The state to continue from."""
    listen: Callable[[Message], None] = lambda _: None
    offer: OnSnapshot = lambda *_: None
    is_finished: bool = False
    _memory: SnapshotMemory = field(init=False)

    def __post_init__(self) -> None:
        """Prepare to follow the snapshots of the workers of this machine."""
        self._memory = SnapshotMemory(
            self.fds["snapshots"],
            self.fds["constants"],
            self.meeting.topology.local_workers,
            self.held.layout if self.held else None,
        )

    @property
    def stop(self) -> Stop:
        """The request to stop, if there was one."""
        return self.watcher.stop

    @property
    def state(self) -> State | None:
        """The newest snapshot of this machine."""
        return self._memory.newest

    @property
    def layout(self) -> Layout | None:
        """The layout of the snapshots, once it is known."""
        return self._memory.layout

    def build(self) -> dict[str, str]:
        """Return everything that decides bits besides the recipe."""
        return dict(self.conditions)

    def run(self) -> State | None:
        """Train until the end or a request to stop; return the newest state."""
        heartbeat = Heartbeat(self.fds["heartbeat"], self.meeting.topology.local_rank)
        rank = self.meeting.topology.rank

        def receive(message: Message) -> None:
            self._receive(message)
            if isinstance(message, SnapshotSaved):
                heartbeat.handle(message.step)

        channel = InProcessChannel(self.job, receive)
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
            self._memory.receive(message, self.offer)
            self._describe(message)
            self.listen(message)
        else:
            self.listen(message)
            self._memory.receive(message, self.offer)

    def _describe(self, started: Started) -> None:
        """Make the snapshots readable for the next generation."""
        assert self.layout is not None
        about = StateInfo(
            recipe=self.job.setup.recipe,
            build={**self.conditions, **started.conditions},
            layout=self.layout,
            workers=self.meeting.topology.local_workers,
        )
        node_state.describe(self.directory, about)
