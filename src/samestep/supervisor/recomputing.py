"""Computes a part of a training again, from a checkpoint, without writing a run."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from samestep.config.placement import Placement
from samestep.config.recipe import Recipe
from samestep.errors import Interrupted
from samestep.messages.job import TrainingJob
from samestep.messages.training import Finished, Message, StepRecord
from samestep.state import hashing
from samestep.state.checkpoint import Checkpoint
from samestep.state.hashing import StepHashes
from samestep.state.layout import Layout
from samestep.state.snapshot import State
from samestep.supervisor.forkserver_client import ForkServer
from samestep.supervisor.job import make_setup
from samestep.supervisor.recovery import Recovery
from samestep.system.signals import stop_on_signals
from samestep.user_code.references import Given


@dataclass
class Recomputed:
    """What the workers report of the steps that they take."""

    hashes: dict[int, StepHashes] = field(default_factory=dict)
    """By step, counted from 1."""
    micro_batches: dict[int, list[int]] = field(default_factory=dict)
    """The hash of each micro-batch's gradient, by step; empty unless they are taken."""
    finished: Finished | None = None
    """The result, if the last step of the training was among them."""
    state: State | None = None
    """The state after the last of them."""
    layout: Layout | None = None
    """Where the tensors lie in it."""

    def listen(self, message: Message) -> None:
        """Receive a message of rank 0."""
        match message:
            case StepRecord(step=step, hashes=hashes):
                steps = StepHashes.parse(hashes)
                first = step - len(steps) + 1
                self.hashes |= dict(enumerate(steps, first))
                numbers = hashing.parse(message.micro_batch_hashes)
                rows = numbers.reshape(len(steps), -1)[:, ::2].tolist()
                self.micro_batches |= dict(enumerate(rows, first))
            case Finished():
                self.finished = message


def recompute(
    server: ForkServer,
    recipe: Recipe,
    placement: Placement,
    objects: Given,
    start: Checkpoint | None,
    until: int,
    conditions: Mapping[str, str],
    logs: Path,
) -> Recomputed:
    """Train from a checkpoint, or from the beginning, to the step `until`.

    Failures of workers are recovered from. Raises TrainingError, UsageError, and
    Interrupted after a signal.
    """
    computed = Recomputed()
    with stop_on_signals() as stop:
        job = TrainingJob(
            setup=make_setup(recipe, placement, objects),
            conditions=dict(conditions),
            until=until,
        )
        recovery = Recovery(
            server=server,
            job=job,
            workers=placement.num_workers,
            min_workers=placement.min_workers or placement.num_workers,
            max_restarts=placement.max_restarts,
            logs=logs,
            stop=stop,
            state=start.state if start else None,
            layout=start.manifest.layout if start else None,
            listen=computed.listen,
            offer=lambda *_: None,
            memories=objects.memories,
        )
        computed.state = recovery.run()
        computed.layout = recovery.layout
        if stop.number is not None:
            raise Interrupted("the audit was stopped", stop.exit_code)
    return computed
