"""`samestep check`: does this recipe keep the promise? And if not, why not?

A few steps on a small part of the data, at 1, 2 and 3 workers over both exchanges, must
end with the same fingerprints. Before them, each worker takes one micro-batch twice, to
see whether its own code has a memory, and whether it depends on the worker.
"""

import os
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from samestep import memory
from samestep.errors import ReplicasDiffer
from samestep.forking import ForkServer
from samestep.jobs import exchange_fields
from samestep.launch import run_workers
from samestep.own import NOTHING, Given
from samestep.placement import Placement
from samestep.recipe import Recipe
from samestep.signals import Stop


STEPS = 4
PLACEMENTS = [(workers, each) for workers in (1, 2, 3) for each in ("shared", "gloo")]


@dataclass
class Trial:
    """One placement, and what its workers found."""

    workers: int
    exchange: str
    sha256: list[str] = field(default_factory=list)
    """Of the weights, after each step."""
    probes: dict[int, dict[str, Any]] = field(default_factory=dict)
    """By rank."""
    differs: str = ""
    """What the workers of this placement did not agree on."""

    def __str__(self) -> str:
        """One line for a person."""
        count = "1 worker" if self.workers == 1 else f"{self.workers} workers"
        return f"{count}, {self.exchange}: {_end(self)}"


@dataclass(frozen=True)
class Verdict:
    """What the trials show."""

    trials: list[Trial]
    reasons: list[str]
    """What breaks exactness, most telling first."""

    @property
    def is_exact(self) -> bool:
        """Whether all trials agree and nothing suspicious was seen."""
        return not self.reasons


def check(recipe: Recipe, server: ForkServer, given: Given = NOTHING) -> Verdict:
    """Trains a few steps at every placement. Raises what a training raises."""
    trials = [
        _try(recipe, workers, exchange, server, given)
        for workers, exchange in PLACEMENTS
        if workers <= recipe.micro_batches
    ]
    return Verdict(trials, list(_reasons(trials)))


def _try(
    recipe: Recipe, workers: int, exchange: str, server: ForkServer, given: Given
) -> Trial:
    trial = Trial(workers, exchange)
    asked = Placement.model_validate(
        {"workers": workers, "exchange": exchange, "balance": "off"}
    )
    job = {
        "kind": "check",
        "recipe": recipe.to_dict(),
        "steps": STEPS,
        "most_samples": STEPS * recipe.global_batch,
        **exchange_fields(asked),
        **given.job,
    }
    fd = memory.create()
    try:
        with tempfile.TemporaryDirectory(prefix="samestep-") as logs:
            memories = {**given.memories, "snapshots": fd}

            def listen(message: dict[str, Any]) -> None:
                if message["type"] == "probed":
                    trial.probes[message["rank"]] = message
                elif message["type"] == "stepped":
                    trial.sha256.append(message["sha256"])

            run_workers(server, job, workers, Path(logs), listen, Stop(), memories)
    except ReplicasDiffer as error:
        trial.differs = str(error)
    finally:
        os.close(fd)
    return trial


def _reasons(trials: list[Trial]) -> Iterator[str]:
    probes = [probe for trial in trials for probe in trial.probes.values()]
    changed = {name for probe in probes for name in probe["changed"]}
    if changed:
        yield (
            f"The same micro-batch gave another result the second time: "
            f"{', '.join(sorted(changed))}. Something remembers earlier calls (an "
            "attribute that `forward` changes, a cache, a counter, a generator of its "
            "own). State belongs into a persistent float32 buffer."
        )
    differing = [
        name
        for name in (probes[0]["sha256"] if probes else ())
        if len({probe["sha256"][name] for probe in probes}) > 1
    ]
    if differing and not changed:
        yield (
            f"The same micro-batch gave other results in other workers: "
            f"{', '.join(differing)}. Something depends on the worker: its rank, its "
            "process (id, time, environment, hash order), or weights that are not "
            "drawn from torch's default generator."
        )
    ends = {tuple(trial.sha256) for trial in trials if not trial.differs}
    if len(ends) > 1 or any(trial.differs for trial in trials):
        yield "The weights differ between placements: " + "; ".join(
            f"{t.workers} over {t.exchange} {_end(t)}" for t in trials
        )


def _end(trial: Trial) -> str:
    if trial.differs or not trial.sha256:
        return "do not agree among themselves"
    return trial.sha256[-1][:16]
