"""One command's work on a run: checkpoints, files and the view together."""

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from samestep.errors import Interrupted, OutputError, SamestepError
from samestep.output.console import View
from samestep.output.run import RunResult
from samestep.output.run_writer import RunWriter
from samestep.state import checkpoint
from samestep.state.checkpoint import Checkpoint
from samestep.state.layout import Layout
from samestep.state.snapshot import State
from samestep.supervisor.checkpoint_writer import Keeper
from samestep.supervisor.forkserver_client import ForkServer
from samestep.supervisor.job import exchange_fields
from samestep.supervisor.recovery import Recovery
from samestep.system.signals import Stop, stop_on_signals
from samestep.user_code.references import Given


class Training(Protocol):
    """What a session keeps: workers that a supervisor starts, or this process."""

    @property
    def stop(self) -> Stop:
        """The wish to stop."""

    @property
    def state(self) -> State | None:
        """The newest snapshot."""

    @property
    def layout(self) -> Layout | None:
        """Of its vectors, as soon as it is known."""

    def build(self) -> dict[str, str]:
        """What decides bits besides the recipe and the checksums of a session."""

    def run(self) -> State | None:
        """Until it is finished or was asked to stop; the newest state."""


@dataclass
class Session:
    """What becomes of a training's messages, from its start to result.json."""

    writer: RunWriter
    view: View
    checksums: Mapping[str, str]
    """Of own code and of data: conditions under which a run goes on."""
    is_behind: bool = False
    """Whether the state is of elsewhere, and a checkpoint of it is still to be made."""
    _final: dict[str, Any] = field(default_factory=dict)
    _steps_per_epoch: int = 1
    _next_checkpoint: float = 0.0
    _keeper: Keeper = field(init=False)

    def run(self, training: Training, notice: str | None) -> RunResult:
        """Raises TrainingError, UsageError, and Interrupted after a signal."""
        self.writer.warn = self.view.warn
        if notice:
            self.writer.event("notice", text=notice)
            self.view.note(f"note: {notice}")
        if not self.is_behind:
            seconds = self.writer.placement.checkpoint_seconds
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
        return self.writer.close("finished", **self._final)

    def _train(self, training: Training) -> None:
        writer, build = self.writer, training.build() | dict(self.checksums)
        self._keeper = Keeper(
            writer.path, writer.recipe, build, self._tell, writer.fence
        )
        try:
            with self._keeper:
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
        """The result; waits for a disk that is full."""
        layout = training.layout
        assert state is not None
        assert layout is not None
        result = checkpoint.result_of(state, layout)
        model = checkpoint.model_bytes(result, layout, self.writer.recipe)
        self.writer.write_model(model)

    def _close(self, status: str, **fields: Any) -> None:
        """After a failure, which a disk that is full as well must not hide."""
        try:
            self.writer.close(status, **fields)
        except OutputError as error:
            self.view.warn(str(error))

    def abandon(self, training: Training) -> None:
        """From another thread: `run` will not return, and this process ends."""
        self._keep_last(training)
        self._keeper.finish()
        self.writer.close("interrupted")

    def _keep_last(self, training: Training) -> None:
        """However the training ended: what was reached goes to the disk."""
        state, layout = training.state, training.layout
        if state is not None and layout is not None:
            epochs = self._epochs_at(state.step)
            self._keeper.offer(lambda: state, layout, epochs, state.step)

    def listen(self, message: Mapping[str, Any]) -> None:
        """A message of rank 0, or of the recovery; each step and epoch once."""
        self.writer.receive(message)
        self.view.receive(message)
        self._look_at_losses(message)
        if message["type"] == "started":
            self._keeper.build = {**self._keeper.build, **message["conditions"]}
            self._steps_per_epoch = message["steps_per_epoch"]
        if message["type"] == "finished":
            self._final = {k: message[k] for k in message if k not in ("type", "rank")}

    def _look_at_losses(self, message: Mapping[str, Any]) -> None:
        """Warn of a loss of evaluation that is not finite; one of training ends it."""
        for split in ("validation", "test"):
            loss = message.get(f"{split}_loss", 0.0)
            if not math.isfinite(loss):
                self.writer.event("not finite", split=split, epoch=message.get("epoch"))
                self.view.warn(
                    f"the {split} loss is {loss}: an input, a target or what "
                    f"the model makes of them is not finite in a {split} sample."
                )

    def offer(
        self, read: Callable[[], State | None], layout: Layout, step: int
    ) -> None:
        """A snapshot: becomes a checkpoint after an epoch, and when it is time."""
        now = time.monotonic()
        if step % self._steps_per_epoch == 0 or now >= self._next_checkpoint:
            seconds = self.writer.placement.checkpoint_seconds
            self._next_checkpoint = now + seconds
            self._keeper.offer(read, layout, self._epochs_at(step), step)

    def _epochs_at(self, step: int) -> list[dict[str, Any]]:
        return self.writer.epochs[: step // self._steps_per_epoch]

    def _tell(self, event: str, fields: dict[str, Any]) -> None:
        """From the thread that writes checkpoints."""
        self.writer.event(event, **fields)
        if event == "checkpoint failed":
            self.view.warn(
                f"the checkpoint of step {fields['step']} cannot be written: "
                f"{fields['error']}. Earlier checkpoints stay."
            )

    def _stopped(self, state: State | None) -> str:
        """Where it stopped; a step is only named with what became of it."""
        if state is None:
            return "stopped before the first snapshot"
        if state.step == self._keeper.newest():
            return f"stopped after step {state.step}"
        why = self._keeper.failure or "not all workers had saved it"
        return f"stopped after step {state.step}, which is not on disk ({why})"

    def _ended(self, how: str, training: Training) -> BaseException:
        """Interrupted if there is something to go on with, else OutputError.

        A scheduler that runs `resume` after some exit codes must not do so for ever.
        """
        if self._keeper.newest() is None:
            return OutputError(f"{how}. {self._remedy}")
        remedy = self._remedy[0].lower() + self._remedy[1:].rstrip(".")
        return Interrupted(f"{how}; {remedy}", training.stop.exit_code)

    @property
    def _remedy(self) -> str:
        newest = self._keeper.newest()
        if newest is None:
            return "Nothing was saved, so there is nothing to go on with: train again."
        return f"Go on with `samestep resume {self.writer.path}`, from step {newest}."


def supervise(
    session: Session,
    server: ForkServer,
    own: Given,
    notice: str | None,
    start: Checkpoint | None = None,
    kept: Mapping[str, str] | None = None,
) -> RunResult:
    """Workers on this machine, started again when one fails. Raises as `run` does.

    `kept` are conditions of `start` that the workers compare.
    """
    placement, recipe = session.writer.placement, session.writer.recipe
    fields = {"kind": "train", "recipe": recipe.to_dict(), **(kept or {})}
    with stop_on_signals() as stop:
        recovery = Recovery(
            server=server,
            job=fields | exchange_fields(placement) | dict(own.job),
            workers=placement.num_workers,
            least_workers=placement.min_workers or placement.num_workers,
            most_restarts=placement.max_restarts,
            logs=session.writer.logs,
            stop=stop,
            state=start.state if start else None,
            layout=start.manifest.layout if start else None,
            listen=session.listen,
            memories=own.memories,
            offer=session.offer,
        )
        return session.run(recovery, notice)
