"""Trains through failures: generations of workers, each from the newest snapshot.

A generation ends when one of its workers dies, hangs or raises. The next one goes on
from the newest state that all workers had saved, and repeats the steps since then with
the same bits, so a failure costs time and nothing else. Each generation has its own
memory: what an old worker still writes, nobody reads.
"""

import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from samestep.errors import (
    CheckpointError,
    NotReproducible,
    PeerLost,
    SamestepError,
    WorkerFailed,
    WorkerLate,
)
from samestep.state import frozen
from samestep.state.layout import Layout
from samestep.state.snapshot import Snapshots, State
from samestep.supervisor.forkserver_client import ForkServer, Message
from samestep.supervisor.launch import run_workers
from samestep.system import machine, shared_memory
from samestep.system.signals import Stop


TRANSIENT = (WorkerFailed, WorkerLate, PeerLost)
"""What may be otherwise the next time; every other error is final."""
FROM_OUTSIDE = (-9, -15, -19)
"""SIGKILL, SIGTERM, SIGSTOP: whoever sends them, it is not the user's code."""


@dataclass
class Budget:
    """How often a training may start again without getting further."""

    most: int
    spent: int = 0
    """Restarts since the training last got further."""
    _furthest: int = -1
    _last: tuple[str, int] | None = None

    def spend(self, error: SamestepError) -> None:
        """Raises the error itself if there is no use in trying again."""
        step: int = error.details.get("step", 0)
        if not isinstance(error, TRANSIENT):
            raise error
        if step > self._furthest:
            self._furthest, self.spent = step, 0
        self.spent += 1
        signature = (_kind(error), step)
        if error.details.get("code") not in FROM_OUTSIDE and signature == self._last:
            phase = error.details.get("phase")
            where = f"while {phase}" if phase else f"at step {step + 1}"
            raise _final(error, f"It failed so {where} twice in a row")
        if self.spent > self.most:
            raise _final(error, f"{self.most} restarts made no progress")
        self._last = signature


def next_workers(
    workers: int, least: int, cores: int, crowded: bool, futile: int
) -> int:
    """How many workers the next generation has: `least` to `workers`.

    Fewer if the machine has lost cores since it could hold all of them (`crowded`: they
    were more than the cores from the beginning), or if `futile` restarts in a row got
    no further, as when memory is short.
    """
    wanted = workers if crowded else min(workers, cores)
    if futile > 1:
        wanted = min(wanted, workers - 1)
    return max(wanted, min(least, workers), 1)


def build_of(
    server: ForkServer,
    device: str,
    most_restarts: int,
    tell: Callable[[SamestepError], None] = lambda _: None,
) -> dict[str, str]:
    """`ForkServer.build`, again if the server ends. Raises WorkerFailed."""
    budget = Budget(most_restarts)
    while True:
        try:
            return server.build(device)
        except WorkerFailed as error:
            budget.spend(error)
            tell(error)


@dataclass
class Recovery:
    """The generations of one training."""

    server: ForkServer
    job: Message
    workers: int
    least_workers: int
    most_restarts: int
    logs: Path
    stop: Stop
    state: State | None
    """Where to begin, if not at the beginning; later the newest state."""
    layout: Layout | None
    listen: Callable[[Message], None]
    """Gets the workers' messages, each step and epoch once, and `failed`, `restart`
    and `caught up` of this class."""
    offer: Callable[[Callable[[], State | None], Layout, int], None]
    """Gets (read, layout, step) of each snapshot."""
    memories: Mapping[str, int] = field(default_factory=dict)
    """More descriptors for the workers."""

    restarts: int = 0
    _snapshots: Snapshots | None = None
    _constants: int = -1
    _reported: dict[str, dict[int, str]] = field(
        default_factory=lambda: {"step": {}, "epoch": {}}
    )
    """By `step` or `epoch` and its number: what came out of it."""
    _evicted: bool = False
    """Whether the last generation ended to go on without its slowest worker."""
    _failed: tuple[float, int] | None = None
    """When the last generation failed, and at which step."""

    def build(self) -> dict[str, str]:
        """What decides bits besides the recipe and its data. Raises WorkerFailed."""
        return build_of(
            self.server, self.job["device"], self.most_restarts, self._tell_failure
        )

    def run(self) -> State | None:
        """Until the training is finished or was asked to stop; the newest state.

        Raises the error that ended the last generation if another one is no use.
        """
        crowded = self.workers > machine.usable_cores()[0]
        budget = Budget(self.most_restarts)
        while True:
            try:
                self._run_generation()
            except SamestepError as error:
                failed, step = time.monotonic(), self._step_of(error)
                error.details = {**error.details, "step": step}
                is_stopping = self.stop.number is not None
                if not (is_stopping and isinstance(error, TRANSIENT)):
                    self._spend(budget, error)
                self._tell_failure(error)
                if is_stopping:
                    return self.state
                self._failed = failed, step
                self.restarts += 1
                self.workers = next_workers(
                    self.workers,
                    self.least_workers,
                    machine.usable_cores()[0],
                    crowded,
                    budget.spent,
                )
                self._tell_restart()
            else:
                if not self._evicted or self.stop.number is not None:
                    return self.state
                self.workers -= 1
                self._tell_restart()

    def _step_of(self, error: SamestepError) -> int:
        """The workers may have failed before they reached a step."""
        return max(int(error.details.get("step", 0)), self._step)

    @property
    def _step(self) -> int:
        return self.state.step if self.state else 0

    def _run_generation(self) -> None:
        fd = shared_memory.create()
        self._constants = shared_memory.create()
        self._snapshots, self._evicted = None, False
        try:
            if self.state is not None and self.layout is not None:
                kept = self.state.constants
                self._snapshots = Snapshots(fd, self.layout, self.workers, kept)
                self._snapshots.fill(self.state)
            run_workers(
                self.server,
                self.job | {"step": self._step},
                self.workers,
                self.logs,
                lambda message: self._hear(message, fd),
                self.stop,
                {**self.memories, "snapshots": fd, "constants": self._constants},
            )
        finally:
            if self._snapshots is not None:
                self.state = self._snapshots.newest() or self.state
            os.close(fd)
            os.close(self._constants)

    def _hear(self, message: Message, fd: int) -> None:
        kind = message["type"]
        if kind == "started":
            layout = Layout.model_validate(message["layout"])
            if self.layout is not None:
                check_same(self.layout, layout)
            self.layout = layout
            self.job |= message["conditions"]
            kept = frozen.read(self._constants)
            self._snapshots = Snapshots(fd, layout, self.workers, kept)
        elif kind == "snapshot":
            assert self._snapshots is not None
            assert self.layout is not None
            slot, snapshots, step = message["slot"], self._snapshots, message["step"]
            self.offer(lambda: of_step(snapshots.read(slot), step), self.layout, step)
        elif kind == "evicted":
            self._evicted = True
        elif kind == "fault":
            faults = self.job["faults"]
            self.job["faults"] = [f for f in faults if f["number"] != message["number"]]
        if kind in ("step", "epoch") and self._is_repeated(kind, message):
            return
        self.listen(message)
        self._note_progress(message)

    def _is_repeated(self, kind: str, message: Message) -> bool:
        """Whether it was reported before a failure made it void.

        Then it must be the same again. Raises NotReproducible.
        """
        number, known = message[kind], self._reported[kind]
        result = message.get("weights_sha256", repr(message.get("loss")))
        if number in known and known[number] != result:
            raise NotReproducible(
                "A step that is computed again after a restart must give the same "
                f"result; the {'weights' if kind == 'epoch' else 'loss'} of {kind} "
                f"{number} was {known[number]} before the restart, and {result} after "
                "it. The usual cause is code of your own that keeps state between "
                "calls; `samestep check` looks for it."
            )
        is_repeated = number in known
        known[number] = result
        return is_repeated

    def _note_progress(self, message: Message) -> None:
        if self._failed and message["type"] in ("step", "snapshot"):
            failed, step = self._failed
            if message["step"] >= step:
                self._failed = None
                seconds = time.monotonic() - failed
                self.listen({"type": "caught up", "step": step, "after": seconds})

    def _spend(self, budget: Budget, error: SamestepError) -> None:
        """Raises the error itself if there is no use in trying again."""
        try:
            budget.spend(error)
        except SamestepError:
            self._tell_failure(error, is_final=True)
            raise

    def _tell_failure(self, error: SamestepError, is_final: bool = False) -> None:
        self.listen(
            {
                "type": "failed",
                "final": is_final,
                "error": str(error),
                "worker": error.details.get("rank"),
                "step": error.details.get("step"),
            }
        )

    def _tell_restart(self) -> None:
        self.listen(
            {
                "type": "restart",
                "number": self.restarts,
                "step": self._step,
                "workers": self.workers,
            }
        )


def check_same(before: Layout, after: Layout) -> None:
    """Raises CheckpointError if the model is not the one that was saved."""
    for what in Layout.model_fields:
        old, new = getattr(before, what), getattr(after, what)
        if old != new:
            raise CheckpointError(
                "A training goes on with the model that it was saved with, and this "
                f"has other {what.replace('_', ' ')}: {_brief(old)} then, "
                f"{_brief(new)} now. A function that builds a model must "
                "always build the same."
            )


def _brief(value: object) -> str:
    text = str(value)
    return text if len(text) <= 200 else text[:200] + "..."


def of_step(state: State | None, step: int) -> State | None:
    """The state, if it is that of this step: a slot is written again and again."""
    return state if state and state.step == step else None


def _kind(error: SamestepError) -> str:
    """The error without its rank, since the workers share the steps' work anew."""
    text = str(error)
    rank = error.details.get("rank")
    return f"{type(error).__name__} {text.replace(f'Worker {rank} ', '')}"


def _final(error: SamestepError, why: str) -> SamestepError:
    last = type(error)(f"{error} {why}, so the training ends.")
    last.details = error.details
    for note in getattr(error, "__notes__", []):
        last.add_note(note)
    return last
