"""`samestep check`: checks that a recipe gives the same bits at any placement.

Two short epochs with the recipe's own global batches, at 1, 2 and 3 workers, over both
exchanges, with random ownership and in another process, must end with the same
fingerprints. Each of these trainings watches and probes user code, as all trainings do
(`samestep.verification.mutation_check`, `samestep.verification.probe`).
"""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from samestep.config.placement import Placement
from samestep.config.recipe import Recipe
from samestep.data.sources import source_of
from samestep.errors import NotPortable, NotReproducible, ReplicasDiffer
from samestep.messages.job import TrainingJob
from samestep.messages.training import EpochRecord, Message
from samestep.output.logs import temporary_logs
from samestep.state import pretrained
from samestep.supervisor.forkserver_client import ForkServer, given_or_new
from samestep.supervisor.job import make_setup
from samestep.supervisor.launch import run_workers
from samestep.system import shared_memory
from samestep.system.signals import Stop
from samestep.user_code.arguments import (
    Part,
    batch_of,
    packed,
    recipe_of,
    split_fields,
    split_parts,
)
from samestep.user_code.references import Given, check_trusted


EPOCHS = 2
"""The second begins after an evaluation, which may have changed the model's state."""
LEAST_STEPS = 4
LEAST_PASSES = 64
"""Fewest micro-batches per trial: user code with a small cache must overflow it."""


@dataclass(frozen=True)
class Trial:
    """One placement to train at."""

    workers: int
    exchange: str = "shared"
    balance: str = "off"
    is_elsewhere: bool = False
    """Whether its workers come from another fork server."""

    def __str__(self) -> str:
        """Return the placement in words."""
        count = "1 worker" if self.workers == 1 else f"{self.workers} workers"
        at_random = ", ownership at random" if self.balance == "random" else ""
        elsewhere = ", in a new process" if self.is_elsewhere else ""
        return f"{count}, {self.exchange}{at_random}{elsewhere}"


TRIALS = (
    *(Trial(n, exchange) for n in (1, 2, 3) for exchange in ("shared", "gloo")),
    Trial(2, balance="random"),
    Trial(1, is_elsewhere=True),
)


@dataclass
class Outcome:
    """The outcome of a trial."""

    trial: Trial
    sha256: list[str] = field(default_factory=list)
    """The fingerprint of the weights after each epoch."""
    reason: str = ""
    """The reason if it ended early."""
    is_refused: bool = False
    """Whether that is the same for every trial: operations without portable kernels."""

    def __str__(self) -> str:
        """Return one line: the placement and the fingerprint."""
        has_ended = self.sha256 and not self.reason
        return f"{self.trial}: {self.sha256[-1][:16] if has_ended else 'stopped'}"


@dataclass(frozen=True)
class Verdict:
    """The outcomes of all trials, and the conclusion."""

    outcomes: list[Outcome]
    reasons: list[str]
    """The causes of different bits, the most specific first."""

    @property
    def is_exact(self) -> bool:
        """Whether all trials agree and none was stopped."""
        return not self.reasons


def check_exactness(
    recipe: Recipe | str | Path | None = None,
    *,
    model: Part | None = None,
    data: Part | None = None,
    loss: Part | None = None,
    optimizer: Part | None = None,
    schedule: Part | None = None,
    server: ForkServer | None = None,
    **fields: Any,
) -> Verdict:
    """Check with a few steps that a recipe gives the same bits at any placement.

    Takes the arguments of `train`, and raises like it.
    """
    parts, sections = split_parts(model, data, loss, optimizer, schedule)
    changed, _ = split_fields(batch_of(recipe, data) | fields | sections)
    with (
        given_or_new(server) as running,
        packed(parts) as (names, given),
    ):
        resolved = recipe_of(recipe, names, changed)
        check_trusted(resolved, names)
        resolved = pretrained.resolved(resolved)
        source_of(resolved.data).prepare()
        short = resolved.changed({"epochs": EPOCHS})
        with ForkServer() as elsewhere:  # imports torch during the first trials
            outcomes = list[Outcome]()
            for trial in TRIALS:
                if trial.workers > short.micro_batches:
                    continue
                where = elsewhere if trial.is_elsewhere else running
                outcomes.append(_run(short, trial, where, given))
                if outcomes[-1].is_refused:
                    break
    return Verdict(outcomes, list(_reasons(outcomes)))


def _run(recipe: Recipe, trial: Trial, server: ForkServer, given: Given) -> Outcome:
    outcome = Outcome(trial)

    def listen(message: Message) -> None:
        if isinstance(message, EpochRecord):
            outcome.sha256.append(message.weights_sha256)

    with shared_memory.temporary() as fd, temporary_logs() as logs:
        memories = {**given.memories, "snapshots": fd}
        job = _job(recipe, trial, given)
        try:
            run_workers(server, job, trial.workers, logs, listen, Stop(), memories)
        except (NotReproducible, ReplicasDiffer) as error:
            outcome.reason = str(error)
        except NotPortable as error:
            outcome.reason, outcome.is_refused = str(error), True
    return outcome


def _job(recipe: Recipe, trial: Trial, given: Given) -> TrainingJob:
    placement = Placement.model_validate(
        {
            "workers": trial.workers,
            "exchange": trial.exchange,
            "balance": trial.balance,
            "snapshot_seconds": 0,
        }
    )
    passes = -(-LEAST_PASSES // (EPOCHS * recipe.micro_batches))
    setup = make_setup(recipe, placement, given)
    return TrainingJob(setup=replace(setup, max_steps=max(LEAST_STEPS, passes)))


def _reasons(outcomes: list[Outcome]) -> Iterator[str]:
    reasons = "\n".join(each.reason for each in outcomes if each.reason)
    yield from dict.fromkeys(line.removeprefix("- ") for line in reasons.splitlines())
    ends = {tuple(each.sha256) for each in outcomes if not each.reason}
    if len(ends) > 1:
        yield "The weights differ between placements: " + "; ".join(map(str, outcomes))
