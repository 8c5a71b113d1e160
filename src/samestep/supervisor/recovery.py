"""Train through failures: generations of workers, each from the newest snapshot.

A generation ends when one of its workers dies, hangs or raises. The next one goes on
from the newest state that all workers had saved, and repeats the steps since then with
the same bits, so a failure costs time and nothing else. Each generation has memory of
its own, so what an old worker may still write is never read.
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from samestep.errors import (
    NotReproducible,
    PeerLost,
    SamestepError,
    WorkerFailed,
    WorkerLate,
    WorkerWrong,
)
from samestep.messages.job import TrainingJob
from samestep.messages.training import (
    CaughtUp,
    EpochRecord,
    EvaluationRecord,
    Evicted,
    FaultInjected,
    GenerationFailed,
    Message,
    Restarted,
    SnapshotSaved,
    Started,
    StepRecord,
    WrongWorker,
)
from samestep.state.layout import Layout
from samestep.state.snapshot import State
from samestep.supervisor.forkserver_client import ForkServer
from samestep.supervisor.launch import run_workers
from samestep.supervisor.snapshot_memory import OnSnapshot, SnapshotMemory
from samestep.system import machine, shared_memory
from samestep.system.signals import Stop


TRANSIENT = (WorkerFailed, WorkerLate, WorkerWrong, PeerLost)
"""Errors that may not happen again; every other error is final."""
FROM_OUTSIDE = (-9, -15)
"""Exit codes of SIGKILL and SIGTERM: the cause is usually outside of user code."""


@dataclass
class RestartBudget:
    """The number of restarts that a training may take without progress."""

    max_restarts: int
    spent: int = 0
    """Restarts since the training last made progress."""
    _furthest: int = -1
    _last: tuple[str, int] | None = None

    def spend(self, error: SamestepError) -> None:
        """Count a restart because of `error`.

        Raises the error, with the reason, if another restart would be pointless.
        """
        step: int = error.details.get("step", 0)
        if not isinstance(error, TRANSIENT):
            raise error
        if step > self._furthest:
            self._furthest, self.spent = step, 0
        self.spent += 1
        signature = (_kind(error), step)
        is_outside = error.details.get("code") in FROM_OUTSIDE
        # The same error twice in a row: another restart would not help. A process that
        # takes the place of one that was wrong may run on another core, though.
        is_outside |= isinstance(error, WorkerWrong)
        if not is_outside and signature == self._last:
            phase = error.details.get("phase")
            where = f"while {phase}" if phase else f"at step {step + 1}"
            raise _final(error, f"It failed in the same way {where} twice in a row")
        if self.spent > self.max_restarts:
            raise _final(error, f"{self.max_restarts} restarts made no progress")
        self._last = signature


def next_workers(
    workers: int,
    min_workers: int,
    cores: int,
    crowded: bool,
    restarts_without_progress: int,
) -> int:
    """Return the number of workers of the next generation.

    At least `min_workers`, at most `workers`: fewer if the machine has lost cores since
    the start (unless there were more workers than cores from the start: `crowded`), or
    after two restarts without progress, for example because memory is short.
    """
    wanted = workers if crowded else min(workers, cores)
    if restarts_without_progress > 1:
        wanted = min(wanted, workers - 1)
    return max(wanted, min(min_workers, workers), 1)


def build_of(
    server: ForkServer,
    device: str,
    max_restarts: int,
    report: Callable[[SamestepError], None] = lambda _: None,
) -> dict[str, str]:
    """Return `ForkServer.build`; try again if the server ends. Raises WorkerFailed."""
    budget = RestartBudget(max_restarts)
    while True:
        try:
            return server.build(device)
        except WorkerFailed as error:
            budget.spend(error)
            report(error)


@dataclass
class Recovery:
    """The generations of one training."""

    server: ForkServer
    job: TrainingJob
    workers: int
    min_workers: int
    max_restarts: int
    logs: Path
    stop: Stop
    state: State | None
    """The state to begin with, if any; later the newest snapshot."""
    layout: Layout | None
    listen: Callable[[Message], None]
    """Called with the workers' messages, each step and epoch once, and with those of
    this class: GenerationFailed, Restarted, CaughtUp."""
    offer: OnSnapshot
    memories: Mapping[str, int] = field(default_factory=dict)
    """Further descriptors for the workers."""

    restarts: int = 0
    _reported: dict[str, dict[int, str]] = field(
        default_factory=lambda: {"step": {}, "epoch": {}, "evaluation": {}}
    )
    """The loss and the last hashes of each step record and the fingerprint of each
    epoch and evaluation, by number."""
    _wrong: int | None = None
    """The worker that was wrong last, if any was."""
    _evicted: bool = False
    """Whether the last generation ended to go on without its slowest worker."""
    _failed: tuple[float, int] | None = None
    """When the last generation failed, and at which step."""

    def build(self) -> dict[str, str]:
        """Return what decides bits besides the recipe and its data.

        Raises WorkerFailed.
        """
        device = self.job.setup.device
        return build_of(self.server, device, self.max_restarts, self._report_failure)

    def run(self) -> State | None:
        """Train until the end, or until asked to stop; return the newest state.

        Raises the error of the last generation if another one would be of no use.
        """
        crowded = self.workers > machine.usable_cores()[0]
        budget = RestartBudget(self.max_restarts)
        while True:
            try:
                self._run_generation()
            except SamestepError as error:
                failed, step = time.monotonic(), self._last_step(error)
                error.details = {**error.details, "step": step}
                is_stopping = self.stop.number is not None
                if not (is_stopping and isinstance(error, TRANSIENT)):
                    self._spend(budget, error)
                self._report_failure(error)
                if is_stopping:
                    return self.state
                self._failed = failed, step
                self.restarts += 1
                self.workers = next_workers(
                    self.workers,
                    self.min_workers,
                    machine.usable_cores()[0],
                    crowded,
                    budget.spent,
                )
                self._report_restart()
            else:
                if not self._evicted or self.stop.number is not None:
                    return self.state
                self.workers -= 1
                self._report_restart()

    def _last_step(self, error: SamestepError) -> int:
        """Return the step of a failure, or of the state if no step was reached."""
        return max(int(error.details.get("step", 0)), self._step)

    @property
    def _step(self) -> int:
        return self.state.step if self.state else 0

    def _run_generation(self) -> None:
        self._evicted = False
        with (
            shared_memory.temporary() as snapshots,
            shared_memory.temporary() as constants,
        ):
            memory = SnapshotMemory(snapshots, constants, self.workers, self.layout)
            if self.state is not None:
                memory.fill(self.state)
            try:
                run_workers(
                    self.server,
                    replace(self.job, step=self._step),
                    self.workers,
                    self.logs,
                    lambda message: self._receive(message, memory),
                    self.stop,
                    {**self.memories, "snapshots": snapshots, "constants": constants},
                )
            finally:
                self.state = memory.newest or self.state

    def _receive(self, message: Message, memory: SnapshotMemory) -> None:
        memory.receive(message, self.offer)
        match message:
            case Started(conditions=conditions):
                self.layout = memory.layout
                self.job = replace(self.job, conditions=conditions)
            case Evicted():
                self._evicted = True
            case FaultInjected(number=number):
                self._forget_fault(number)
            case StepRecord(step=step, metrics=metrics, hashes=hashes):
                result = f"{metrics.get('loss')!r} (hashes {hashes[-32:]})"
                if self._is_repeated("step", step, result):
                    return
            case EpochRecord(epoch=epoch, weights_sha256=sha256):
                if self._is_repeated("epoch", epoch, sha256):
                    return
            case EvaluationRecord(step=step, weights_sha256=sha256):
                if self._is_repeated("evaluation", step, sha256):
                    return
        self.listen(message)
        if isinstance(message, StepRecord | SnapshotSaved):
            self._report_progress(message.step)

    def _forget_fault(self, number: int) -> None:
        """Leave out a fault that has happened from the next workers' job."""
        setup = self.job.setup
        faults = [fault for fault in setup.faults if fault.number != number]
        self.job = replace(self.job, setup=replace(setup, faults=faults))

    def _is_repeated(self, kind: str, number: int, result: str) -> bool:
        """Return whether a step or an epoch was reported by an earlier generation.

        Raises NotReproducible if its result differs.
        """
        known = self._reported[kind]
        if number in known and known[number] != result:
            raise NotReproducible(
                "A step that is computed again after a restart must give the same "
                f"result; the {'loss' if kind == 'step' else 'fingerprint'} of {kind} "
                f"{number} was {known[number]} before the restart, and {result} after "
                f"it. {self._cause}"
            )
        is_repeated = number in known
        known[number] = result
        return is_repeated

    @property
    def _cause(self) -> str:
        """What is likely if a step gives another result when it is computed again."""
        if self._wrong is None:
            return (
                "The usual cause is code of your own that keeps state between calls; "
                "`samestep check` looks for it."
            )
        return (
            f"Worker {self._wrong} was wrong later, so probably there, too, where no "
            "other worker had computed the same: train again, or go on from an older "
            "checkpoint."
        )

    def _report_progress(self, step: int) -> None:
        """Report once that the step of the last failure was reached again."""
        if self._failed is None or step < self._failed[1]:
            return
        (failed, last_step), self._failed = self._failed, None
        after = time.monotonic() - failed
        self.listen(CaughtUp(step=last_step, after=after))

    def _spend(self, budget: RestartBudget, error: SamestepError) -> None:
        """Raise the error itself if another try would be of no use."""
        try:
            budget.spend(error)
        except SamestepError:
            self._report_failure(error, is_final=True)
            raise

    def _report_failure(self, error: SamestepError, is_final: bool = False) -> None:
        if isinstance(error, WorkerWrong):
            step, self._wrong = error.details["step"] + 1, error.details["rank"]
            self.listen(WrongWorker(step=step, worker=self._wrong))
        self.listen(
            GenerationFailed(
                final=is_final,
                error=str(error),
                worker=error.details.get("rank"),
                step=error.details.get("step"),
            )
        )

    def _report_restart(self) -> None:
        self.listen(
            Restarted(number=self.restarts, step=self._step, workers=self.workers)
        )


def _kind(error: SamestepError) -> str:
    """Return the error without its rank.

    After a restart another rank may own the micro-batch that fails.
    """
    text = str(error)
    rank = error.details.get("rank")
    return f"{type(error).__name__} {text.replace(f'Worker {rank} ', '')}"


def _final(error: SamestepError, why: str) -> SamestepError:
    last = type(error)(f"{error} {why}, so the training ends.")
    last.details = error.details
    for note in getattr(error, "__notes__", []):
        last.add_note(note)
    return last
