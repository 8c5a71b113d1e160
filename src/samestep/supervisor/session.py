"""One command's work on a run: its files, its checkpoints and the view."""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from samestep.config.placement import Placement
from samestep.config.recipe import Recipe
from samestep.core.ownership import spaced
from samestep.errors import Interrupted, OutputError, SamestepError
from samestep.messages.job import TrainingJob
from samestep.messages.training import (
    EpochRecord,
    EvaluationRecord,
    Finished,
    Message,
    SnapshotSaved,
    Started,
)
from samestep.messages.wire import as_record
from samestep.output.console import View
from samestep.output.run import RunResult
from samestep.output.run_writer import RunWriter
from samestep.state import checkpoint
from samestep.state.checkpoint import Checkpoint
from samestep.state.layout import Layout
from samestep.state.snapshot import State
from samestep.supervisor.checkpoint_writer import CheckpointWriter, Offer
from samestep.supervisor.forkserver_client import ForkServer
from samestep.supervisor.job import make_setup
from samestep.supervisor.recovery import Recovery
from samestep.system.signals import Stop, stop_on_signals
from samestep.user_code.references import Given


class Training(Protocol):
    """A training that a session keeps: workers of a supervisor, or this process."""

    @property
    def stop(self) -> Stop:
        """The request to stop, if any."""

    @property
    def state(self) -> State | None:
        """The newest snapshot."""

    @property
    def layout(self) -> Layout | None:
        """The layout of the state's vectors, as soon as it is known."""

    def build(self) -> dict[str, str]:
        """Return what decides bits besides the recipe and a session's checksums."""

    def run(self) -> State | None:
        """Train until the end, or until asked to stop; return the newest state."""


@dataclass
class Session:
    """Writes and shows a training's messages, from its start to result.json."""

    writer: RunWriter
    recipe: Recipe
    placement: Placement
    view: View
    checksums: Mapping[str, str]
    """Checksums of user code and of data: conditions under which a run goes on."""
    is_behind: bool = False
    """Whether the state came from another machine, so that there is no checkpoint."""
    _final: Finished | None = None
    _epochs: int = 0
    """Complete epochs at the newest snapshot."""
    _next_checkpoint: float = 0.0
    _checkpoints: CheckpointWriter = field(init=False)

    def run(self, training: Training, notice: str | None) -> RunResult:
        """Train, and write result.json however that ends.

        Raises TrainingError, UsageError, and Interrupted after a signal.
        """
        self.writer.warn = self.view.warn
        if notice:
            self.writer.event("notice", text=notice)
            self.view.note(f"note: {notice}")
        if not self.is_behind:
            seconds = self.placement.checkpoint_seconds
            self._next_checkpoint = time.monotonic() + seconds
        try:
            self._train(training)
        except SamestepError as error:
            rank = error.details.get("rank")
            self._close("failed", error=str(error), failed_rank=rank)
            raise
        except BaseException:  # Ctrl-C, SIGTERM
            self._close("interrupted")
            raise
        assert self._final is not None
        return self.writer.close("finished", **as_record(self._final))

    def _train(self, training: Training) -> None:
        writer, build = self.writer, training.build() | dict(self.checksums)
        self._checkpoints = CheckpointWriter(
            writer.path, self.recipe, build, self.listen, writer.fence
        )
        try:
            with self._checkpoints:
                try:
                    state = training.run()
                    if self._final:
                        self._write_model(training, state)
                finally:
                    self._keep_last(training)
        except Interrupted as error:
            if not training.stop.is_urgent:
                raise
            raise self._ended(str(error), training) from None
        except OutputError as error:
            if not self._final:
                raise
            raise OutputError(f"{error} {self._remedy}") from None
        if not self._final:
            raise self._ended(self._stopped(state), training)

    def _write_model(self, training: Training, state: State | None) -> None:
        """Write the final weights; waits for a disk that is full."""
        layout = training.layout
        assert state is not None
        assert layout is not None
        result = checkpoint.result_of(state, layout)
        model = checkpoint.model_bytes(result, layout, self.recipe)
        self.writer.write_model(model)

    def _close(self, status: str, **fields: Any) -> None:
        """Write result.json after a failure, which a full disk must not hide."""
        try:
            self.writer.close(status, **fields)
        except OutputError as error:
            self.view.warn(str(error))

    def abandon(self, training: Training) -> None:
        """Save what there is, from another thread, before this process ends.

        `run` does not return any more.
        """
        self._keep_last(training)
        self._checkpoints.finish()
        self.writer.close("interrupted")

    def _keep_last(self, training: Training) -> None:
        """Make a checkpoint of the newest state, however the training ended."""
        state, layout = training.state, training.layout
        if state is not None and layout is not None:
            epochs = self.writer.epochs[: state.epochs]
            offer = Offer(lambda: state, layout, epochs, state.step)
            self._checkpoints.offer(offer)

    def listen(self, message: Message) -> None:
        """Receive a message of rank 0, the recovery or the thread of checkpoints.

        Each step and each epoch comes once.
        """
        self.writer.receive(message)
        self.view.receive(message)
        match message:
            case Started(conditions=conditions, steps_per_epoch=steps):
                self._checkpoints.build = {**self._checkpoints.build, **conditions}
                total = self.recipe.num_steps(steps)
                number = self.placement.keep_checkpoints
                self._checkpoints.kept = spaced(total, number)
            case EpochRecord(epoch=epoch, validation_metrics=metrics):
                self._check_loss("validation", metrics.get("validation_loss"), epoch)
            case EvaluationRecord(epoch=epoch, validation_metrics=metrics):
                self._check_loss("validation", metrics.get("validation_loss"), epoch)
            case Finished(test_metrics=metrics):
                self._check_loss("test", metrics.get("test_loss"), None)
                self._final = message

    def _check_loss(self, split: str, loss: float | None, epoch: int | None) -> None:
        """Warn of a loss that is not finite; in training that is an error."""
        if loss is None or math.isfinite(loss):
            return
        self.writer.event("not finite", split=split, epoch=epoch)
        self.view.warn(
            f"the {split} loss is {loss}: an input, a target or what the model makes "
            f"of them is not finite in a {split} sample."
        )

    def offer(
        self, read: Callable[[], State | None], layout: Layout, saved: SnapshotSaved
    ) -> None:
        """Make a checkpoint of a snapshot after an epoch, and when it is time."""
        now = time.monotonic()
        is_new, self._epochs = saved.epochs > self._epochs, saved.epochs
        is_kept = saved.step in self._checkpoints.kept or self._is_due(saved.step)
        if is_new or is_kept or now >= self._next_checkpoint:
            seconds = self.placement.checkpoint_seconds
            self._next_checkpoint = now + seconds
            epochs = self.writer.epochs[: saved.epochs]
            self._checkpoints.offer(Offer(read, layout, epochs, saved.step))

    def _is_due(self, step: int) -> bool:
        """Return whether a checkpoint comes after a step."""
        intervals = self.placement.checkpoint_steps, self.recipe.evaluation_steps
        return any(every and step % every == 0 for every in intervals)

    def _stopped(self, state: State | None) -> str:
        """Return where the training stopped, and whether that is on disk."""
        if state is None:
            return "stopped before the first snapshot"
        if state.step == self._checkpoints.newest():
            return f"stopped after step {state.step}"
        why = self._checkpoints.failure or "not all workers had saved it"
        return f"stopped after step {state.step}, which is not on disk ({why})"

    def _ended(self, how: str, training: Training) -> BaseException:
        """Return Interrupted if there is a checkpoint to go on with, else OutputError.

        Schedulers run `resume` after the exit codes of Interrupted, and would do so for
        ever if nothing was ever saved.
        """
        if self._checkpoints.newest() is None:
            return OutputError(f"{how}. {self._remedy}")
        remedy = self._remedy[0].lower() + self._remedy[1:].rstrip(".")
        return Interrupted(f"{how}; {remedy}", training.stop.exit_code)

    @property
    def _remedy(self) -> str:
        newest = self._checkpoints.newest()
        if newest is None:
            return "Nothing was saved, so there is nothing to go on with: train again."
        return f"Go on with `samestep resume {self.writer.path}`, from step {newest}."


def supervise(
    session: Session,
    server: ForkServer,
    objects: Given,
    notice: str | None,
    start: Checkpoint | None = None,
    conditions: Mapping[str, str] | None = None,
    callbacks: Sequence[str] = (),
) -> RunResult:
    """Train with workers on this machine, and start them again when one fails.

    Begins with the checkpoint `start`, whose `conditions` the workers compare. The
    worker of rank 0 finds the `callbacks` by their references. Raises as `Session.run`
    does.
    """
    placement, recipe = session.placement, session.recipe
    with stop_on_signals() as stop:
        recovery = Recovery(
            server=server,
            job=TrainingJob(
                setup=make_setup(recipe, placement, objects, callbacks),
                conditions=dict(conditions or {}),
            ),
            workers=placement.num_workers,
            min_workers=placement.min_workers or placement.num_workers,
            max_restarts=placement.max_restarts,
            logs=session.writer.logs,
            stop=stop,
            state=start.state if start else None,
            layout=start.manifest.layout if start else None,
            listen=session.listen,
            memories=objects.memories,
            offer=session.offer,
        )
        return session.run(recovery, notice)
