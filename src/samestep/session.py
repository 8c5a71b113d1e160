"""One command's work on a run: recovery, checkpoints, files and the view together."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from samestep import checkpoint
from samestep.checkpoint import Checkpoint
from samestep.errors import Interrupted, SamestepError
from samestep.forking import ForkServer
from samestep.jobs import exchange_fields
from samestep.keeper import Keeper
from samestep.layout import Layout
from samestep.own import NOTHING, Given
from samestep.recovery import Recovery
from samestep.run import Run
from samestep.signals import Stop, stop_on_signals
from samestep.snapshot import State
from samestep.view import View
from samestep.writer import RunWriter


@dataclass
class Session:
    """The supervisor's side of a training, from its first worker to result.json."""

    writer: RunWriter
    server: ForkServer
    view: View
    own: Given = NOTHING
    """Objects that a Python caller gave."""
    checksums: Mapping[str, str] = field(default_factory=dict)
    """Of own code and of data: conditions under which a run goes on."""
    _final: dict[str, Any] = field(default_factory=dict)
    _steps_per_epoch: int = 1
    _next_checkpoint: float = 0.0

    def run(self, notice: str | None, start: Checkpoint | None = None) -> Run:
        """Raises TrainingError, UsageError, and Interrupted after a signal."""
        self.writer.warn = lambda text: self.view.note(f"warning: {text}")
        if notice:
            self.writer.event("notice", text=notice)
            self.view.note(f"note: {notice}")
        try:
            with stop_on_signals() as stop:
                self._train(stop, start)
        except SamestepError as error:
            rank = error.details.get("rank")
            self.writer.close("failed", error=str(error), failed_rank=rank)
            raise
        except BaseException:  # Ctrl-C, SIGTERM
            self.writer.close("interrupted")
            raise
        return self.writer.close("finished", **self._final)

    def _train(self, stop: Stop, start: Checkpoint | None) -> None:
        placement, recipe = self.writer.placement, self.writer.recipe
        fields = {"kind": "train", "recipe": recipe.to_dict()}
        self._next_checkpoint = time.monotonic() + placement.checkpoint_seconds
        # Not by the keeper: one thread reads the channel.
        build = self.server.build(placement.device) | dict(self.checksums)
        with Keeper(self.writer.path, recipe, build, self._tell) as keeper:
            recovery = Recovery(
                server=self.server,
                job=fields | exchange_fields(placement) | dict(self.own.job),
                workers=placement.num_workers,
                least_workers=placement.min_workers or placement.num_workers,
                most_restarts=placement.max_restarts,
                logs=self.writer.logs,
                stop=stop,
                state=start.state if start else None,
                layout=start.manifest.layout if start else None,
                listen=self._listen,
                memories=self.own.memories,
                offer=lambda read, layout, step: self._offer(
                    keeper, read, layout, step
                ),
            )
            try:
                state = recovery.run()
                if self._final:
                    assert state is not None
                    assert recovery.layout is not None
                    model = checkpoint.model_bytes(
                        checkpoint.result_of(state, recovery.layout),
                        recovery.layout,
                        recipe,
                    )
                    self.writer.write_model(model)  # waits for a disk that is full
            finally:
                self._keep_last(keeper, recovery)
        if not self._final:
            raise Interrupted(self._stopped(state), stop.exit_code)

    def _keep_last(self, keeper: Keeper, recovery: Recovery) -> None:
        """However the training ended: what was reached goes to the disk."""
        state, layout = recovery.state, recovery.layout
        if state is not None and layout is not None:
            keeper.offer(lambda: state, layout, self._epochs_at(state.step))

    def _listen(self, message: Mapping[str, Any]) -> None:
        self.writer.receive(message)
        self.view.receive(message)
        if message["type"] == "started":
            self._steps_per_epoch = message["steps_per_epoch"]
        if message["type"] == "finished":
            self._final = {k: message[k] for k in message if k not in ("type", "rank")}

    def _offer(
        self,
        keeper: Keeper,
        read: Callable[[], State | None],
        layout: Layout,
        step: int,
    ) -> None:
        """At the end of an epoch, and when it is time."""
        now = time.monotonic()
        if step % self._steps_per_epoch == 0 or now >= self._next_checkpoint:
            seconds = self.writer.placement.checkpoint_seconds
            self._next_checkpoint = now + seconds
            keeper.offer(read, layout, self._epochs_at(step))

    def _epochs_at(self, step: int) -> list[dict[str, Any]]:
        return self.writer.epochs[: step // self._steps_per_epoch]

    def _tell(self, event: str, fields: dict[str, Any]) -> None:
        """From the thread that writes checkpoints."""
        self.writer.event(event, **fields)
        if event == "checkpoint failed":
            self.view.note(
                f"warning: the checkpoint of step {fields['step']} cannot be written: "
                f"{fields['error']}. The training goes on; earlier checkpoints stay."
            )

    def _stopped(self, state: State | None) -> str:
        path = self.writer.path
        step = state.step if state else 0
        return f"stopped after step {step}; go on with `samestep resume {path}`"
