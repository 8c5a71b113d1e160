"""Computes steps of a run again and compares them with its ledger."""

import math
import random
import secrets
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from samestep.api.resolving import resolved
from samestep.api.run import Run
from samestep.api.train import described
from samestep.config.placement import Placement
from samestep.config.recipe import Recipe
from samestep.errors import NonFiniteGradient, NonFiniteLoss, RunError, UsageError
from samestep.output.logs import temporary_logs
from samestep.state.checkpoint import Checkpoint
from samestep.supervisor import claims as claiming
from samestep.supervisor.blame import WrongMicroBatch
from samestep.supervisor.claims import Claims, Mismatch, Segment
from samestep.supervisor.forkserver_client import ForkServer, given_or_new
from samestep.supervisor.recomputing import Recomputed, recompute
from samestep.supervisor.recovery import build_of
from samestep.supervisor.resume import differences, kept_for_workers
from samestep.user_code.arguments import (
    Part,
    packed,
    placement_of,
    recipe_of,
    split_parts,
)
from samestep.user_code.references import Given


SEGMENTS = 3
"""Segments that are computed again by default."""


@dataclass
class Audit:
    """What an audit of a run has found."""

    path: Path
    """The run."""
    seed: int
    """The seed of the choice of segments."""
    steps: int = 0
    """Optimizer steps in the ledger; 0 if that could not be read."""
    segments: Sequence[Segment] = ()
    """The parts between checkpoints: from after one step to another."""
    computed: list[Segment] = field(default_factory=list)
    """Those that were computed again."""
    seconds: float = 0.0
    mismatch: str | None = None
    """What is wrong, None if nothing was found."""
    step: int | None = None
    """The first wrong step that was found, counted from 1, if it is one of them."""
    micro_batches: Sequence[WrongMicroBatch] = ()
    """Those of this step that are wrong, with the worker of each, if the run has hashes
    of them."""

    @property
    def checked(self) -> int:
        """The number of steps that were computed again."""
        return sum(end - first for first, end in self.computed)

    def probability(self, share: float) -> float:
        """Return how likely a run with this share of false steps would be found.

        At least: a forger falsifies steps in as few segments as possible, but does not
        know which ones are chosen.
        """
        false, wanted = 0, share * self.steps
        for length in sorted((b - a for a, b in self.segments), reverse=True):
            if wanted <= 0:
                break
            false, wanted = false + 1, wanted - length
        total, chosen = len(self.segments), len(self.computed)
        missed = math.comb(total - false, chosen) / math.comb(total, chosen)
        return 1 - missed


def audit(
    run: Run | str | Path,
    placement: Placement | None = None,
    *,
    segments: int = SEGMENTS,
    full: bool = False,
    seed: int | None = None,
    model: Part | None = None,
    data: Part | None = None,
    loss: Part | None = None,
    optimizer: Part | None = None,
    schedule: Part | None = None,
    server: ForkServer | None = None,
    **placed: Any,
) -> Audit:
    """Compute randomly chosen parts of a run again and compare each step.

    `segments` parts between the checkpoints of the run are chosen by `seed`, or all of
    them if `full`; the placement is any. The files of the run are checked against each
    other before. Code of your own is found as by `resume`; objects that were given to
    `train` as `model`, `data` and so on must be given again. `placed` are fields of the
    placement (`workers=2`). Nothing is written. Raises RunError if the run cannot be
    audited here; what does not match is in the result.
    """
    if segments < 1:
        raise UsageError(f"An audit computes 1 segment or more; received {segments}.")
    started = time.monotonic()
    parts, _ = split_parts(model, data, loss, optimizer, schedule)
    path = run.path if isinstance(run, Run) else Path(run)
    found = Audit(path, secrets.randbelow(1 << 32) if seed is None else seed)
    try:
        claims = claiming.read(path)
        found.steps, found.segments = claims.steps, claims.segments
        claiming.check_checkpoints(claims)
        with (
            given_or_new(server) as running,
            packed(parts) as (names, given),
            temporary_logs() as logs,
        ):
            again = _prepared(claims, placement_of(placement, placed), running, names)
            number = len(claims.segments) if full else segments
            for segment in _chosen(claims, number, found.seed):
                again.check(segment, given, logs)
                found.computed.append(segment)
    except Mismatch as error:
        found.mismatch, found.step = str(error), error.step
        found.micro_batches = error.micro_batches
    found.seconds = time.monotonic() - started
    return found


def _chosen(claims: Claims, number: int, seed: int) -> list[Segment]:
    """Choose segments at random; in the order of their steps."""
    every = claims.segments
    draw = random.Random(seed)  # noqa: S311  an auditor's seed is not known before
    return sorted(draw.sample(every, min(number, len(every))))


@dataclass(frozen=True)
class _Again:
    """Computes segments of a run again."""

    claims: Claims
    recipe: Recipe
    placement: Placement
    server: ForkServer
    conditions: Mapping[str, str]
    """Those of this machine, and of data and code here."""

    def check(self, segment: Segment, objects: Given, logs: Path) -> None:
        """Compute the steps of a segment. Raises Mismatch for the first wrong one."""
        first, end = segment
        start = self.claims.load(first)
        # Those under which the segment was computed, if it ends with a checkpoint.
        saved = self.claims.load(end) if end in self.claims.checkpoints else start
        conditions = self._check_conditions(saved)
        try:
            computed = recompute(
                self.server,
                self.recipe,
                self.placement,
                objects,
                start,
                end,
                conditions,
                logs,
            )
        except (NonFiniteLoss, NonFiniteGradient) as error:
            where = f"computed again after step {first}, the training fails: {error}"
            raise Mismatch(where, None) from None
        self.claims.check_steps(segment, computed)
        if end in self.claims.checkpoints:
            self.claims.check_state(end, computed.state, computed.layout)
        if end == self.claims.steps and self.claims.is_finished:
            self._check_end(computed)

    def _check_conditions(self, saved: Checkpoint | None) -> dict[str, str]:
        """Return the conditions for workers. Raises RunError if others decided bits."""
        if saved is None:
            if self.recipe.is_portable:
                return {}
            raise RunError(
                f"{self.claims.run.path} has no checkpoint, which would say on which "
                "machine it was trained, so its steps cannot be computed again: use "
                '`arithmetic = "portable"`, or train on with `samestep resume`.'
            )
        build = saved.manifest.build
        then = Recipe.from_dict(saved.manifest.recipe, warn=False), build
        changed = list(differences(then, (self.recipe, self.conditions)))
        if changed:
            raise RunError(
                "An audit computes steps again under the conditions of the run, since "
                "under others they have other bits. These differ: "
                f"{'; '.join(changed)}. Audit it where they are those of the run."
            )
        return kept_for_workers(build)

    def _check_end(self, computed: Recomputed) -> None:
        step, result = self.claims.steps, self.claims.run
        if computed.finished is None:
            raise Mismatch(f"the training does not end with step {step}", step)
        sha256 = computed.finished.weights_sha256
        if sha256 != result.weights_sha256:
            raise Mismatch(
                f"the final weights have the fingerprint {sha256} when they are "
                f"computed again, and {result.weights_sha256} in result.json"
            )


def _prepared(
    claims: Claims, placement: Placement, server: ForkServer, names: Mapping[str, str]
) -> _Again:
    """Prepare to compute; refuses code and devices as `resume` does."""
    recipe = recipe_of(claims.recipe, names, {})
    kind = "steps" if claims.micro_batches is None else "micro-batches"
    placement = placement.model_copy(update={"ledger": kind})
    placement = resolved(recipe, placement, names, server.gpus).placement
    build = build_of(server, placement.device, placement.max_restarts)
    return _Again(claims, recipe, placement, server, build | described(recipe)[1])
