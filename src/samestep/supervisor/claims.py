"""What a run directory claims about its training, checked against itself.

The directory comes from somebody else: JSON is checked against schemas, tensors against
their manifests, and nothing in it is executed. Steps are not computed again here; see
`supervisor.recomputing`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

from samestep.config.recipe import Recipe
from samestep.core.progress import Progress
from samestep.errors import CheckpointError, RecipeError, RunError
from samestep.files import untrusted
from samestep.output import ledger
from samestep.output.ledger import Ledger
from samestep.output.run import RunResult
from samestep.state import checkpoint
from samestep.state.checkpoint import Checkpoint
from samestep.state.hashing import StepHashes, hash_of
from samestep.state.layout import Layout
from samestep.state.snapshot import State
from samestep.supervisor import blame
from samestep.supervisor.blame import WrongMicroBatch
from samestep.supervisor.recomputing import Recomputed
from samestep.supervisor.resume import recipe_differences


DECIDING = {"epochs", "stream", "counts", "optimizer", "plateau", "stopping"}
"""What of the progress decides how a training goes on; the rest is measured."""

Segment = tuple[int, int]
"""The steps after the first number, up to the second."""


class Mismatch(Exception):
    """A run is not what it claims to be; the text says where."""

    def __init__(
        self,
        text: str,
        step: int | None = None,
        micro_batches: Sequence[WrongMicroBatch] = (),
    ) -> None:
        """Keep the text, and the first wrong step and micro-batches if known."""
        super().__init__(text)
        self.step, self.micro_batches = step, micro_batches


@dataclass(frozen=True)
class Claims:
    """The claims of a run whose ledger has been checked against its own chain."""

    run: RunResult
    recipe: Recipe
    ledger: Ledger
    micro_batches: Ledger | None
    """The ledger of micro-batches, if the run has one."""
    checkpoints: list[int] = field(default_factory=list)
    """The steps of the checkpoints, in order."""

    @property
    def steps(self) -> int:
        """The number of steps in the ledger."""
        return len(self.ledger.records)

    @property
    def is_finished(self) -> bool:
        """Whether the run claims to have final weights."""
        return self.run.status == "finished"

    @property
    def segments(self) -> list[Segment]:
        """The parts `(a, b]` of the training between checkpoints, and the ends."""
        inside = [step for step in self.checkpoints if 0 < step < self.steps]
        cuts = [0, *inside, self.steps]
        return list(pairwise(cuts))

    def hashes(self, step: int) -> StepHashes:
        """Return the hashes that the ledger has for a step, counted from 1."""
        return StepHashes(*self.ledger.records[step - 1, 1:].tolist())

    def check_steps(self, segment: Segment, computed: Recomputed) -> None:
        """Compare what was computed again. Raises Mismatch for the first wrong step."""
        for step in range(segment[0] + 1, segment[1] + 1):
            claimed, found = self.hashes(step), computed.hashes.get(step)
            if found is None:
                raise Mismatch(f"the training ends before step {step}", step)
            differs = f"step {step} differs when it is computed again"
            wrong, cause = self._compare_micro_batches(step, computed)
            for part, ours, theirs in zip(found._fields, found, claimed, strict=True):
                if ours != theirs:
                    raise Mismatch(
                        f"{differs}: the hash of its {part} is {theirs:016x} in the "
                        f"ledger, and {ours:016x} now{cause}",
                        step,
                        wrong,
                    )
            if wrong:
                text = f"{differs}, though the ledger of steps is right{cause}"
                raise Mismatch(text, step, wrong)

    def _compare_micro_batches(
        self, step: int, computed: Recomputed
    ) -> tuple[list[WrongMicroBatch], str]:
        """Return which micro-batches of a step differ, and that in words."""
        if self.micro_batches is None:
            return [], ""
        claimed = self.micro_batches.records[step - 1, 1:]
        wrong = blame.wrong_micro_batches(claimed, computed.micro_batches[step])
        if not wrong:
            return (
                [],
                "; all micro-batches are right, so what came after them went wrong",
            )
        return wrong, f"; {blame.in_words(wrong, self.recipe.micro_batches)}"

    def check_state(
        self, step: int, computed: State | None, layout: Layout | None
    ) -> None:
        """Compare a checkpoint with the state that was computed again. Raises Mismatch.

        The ledger has hashes of the parameters alone, and the next segment begins with
        all of the state: so false numbers there would be taken for true ones.
        """
        claimed = self.load(step)
        assert claimed is not None
        if computed is None or layout is None or computed.step != step:
            raise Mismatch(f"the training has no state after step {step}", step)
        ours = _parts(computed, layout)
        for what, theirs in _parts(claimed.state, claimed.manifest.layout).items():
            if ours[what] != theirs:
                raise Mismatch(
                    f"{what} in the checkpoint of step {step} differ from those that "
                    "are computed again",
                    step,
                )

    def load(self, step: int) -> Checkpoint | None:
        """Load the checkpoint of a step, None for step 0. Raises Mismatch."""
        if step == 0:
            return None
        path = checkpoint.path_of(checkpoint.directory_of(self.run.path), step)
        try:
            loaded = checkpoint.load(path)
        except (CheckpointError, OSError) as error:
            raise Mismatch(str(error), step) from None
        if loaded.state.step != step:
            raise Mismatch(f"the checkpoint {path.name} is of another step", step)
        return loaded


def _parts(state: State, layout: Layout) -> dict[str, object]:
    """Return by their names all parts that files of weights and a resume need."""
    progress = Progress.model_validate(state.progress)
    constants = {n: (a.dtype, a.shape, a.tobytes()) for n, a in state.constants.items()}
    return {
        "the names and shapes of the tensors": layout,
        "the parameters": state.parameters.tobytes(),
        "the optimizer's states": state.states.tobytes(),
        "the buffers": state.tail.tobytes(),
        "the frozen tensors": constants,
        "the numbers of the schedule and others": progress.model_dump_json(
            include=DECIDING
        ),
    }


def read(path: Path) -> Claims:
    """Read a run.

    Raises RunError if it has no ledger, and Mismatch if that is not the ledger of its
    result and recipe.
    """
    run = RunResult.open(path)
    recipe, result = run.recipe, run.result
    if result.get("ledger_sha256") is None:
        raise RunError(
            f"An audit compares steps with the ledger of the run, and {path} has none: "
            "an earlier version wrote it, or some of its steps were lost."
        )
    columns = ledger.columns(recipe.micro_batches)
    found = _read(path / ledger.FILE, columns, "the ledger", result["ledger_sha256"])
    if not len(found.records):
        raise RunError(f"The ledger of {path} has no steps: there is nothing to audit.")
    _check_recipe(run, recipe, found)
    micro_batches, closing = None, result.get("micro_batch_ledger_sha256")
    if closing is not None:
        what, file = "the ledger of micro-batches", path / ledger.MICRO_BATCHES
        micro_batches = _read(file, columns, what, closing)
        if micro_batches.recipe_digest != recipe.digest:
            raise Mismatch(f"recipe.toml is not the recipe of {what}")
        if len(micro_batches.records) != len(found.records):
            raise Mismatch(f"{what} has not as many steps as the ledger")
    steps = checkpoint.steps(checkpoint.directory_of(path))
    return Claims(run, recipe, found, micro_batches, steps)


def _read(file: Path, columns: Mapping[str, int], what: str, closing: str) -> Ledger:
    """Read one of the ledgers. Raises Mismatch if it does not end with `closing`."""
    try:
        found = ledger.parse(untrusted.read_bytes(file), columns[file.name])
    except (OSError, ValueError) as error:
        raise Mismatch(f"{what} cannot be used: {error}") from None
    if not found.is_whole:
        raise Mismatch(f"{what} ends in the middle of a chunk")
    if found.head.hex() != closing:
        raise Mismatch(f"the SHA-256 of {what} is not the one in result.json")
    return found


def _check_recipe(run: RunResult, recipe: Recipe, found: Ledger) -> None:
    if recipe.digest != found.recipe_digest:
        raise Mismatch("recipe.toml is not the recipe of the ledger")
    try:
        reported = Recipe.from_dict(run.result["recipe"], warn=False)
    except RecipeError as error:
        raise Mismatch(f"the recipe in result.json is not valid: {error}") from None
    if reported.digest != recipe.digest:
        raise Mismatch("the recipe in result.json is not that of recipe.toml")


def check_checkpoints(claims: Claims) -> None:
    """Check that checkpoints and final weights are those of the ledger.

    Raises Mismatch.
    """
    for step in claims.checkpoints:
        _check_checkpoint(claims, step)
    if claims.is_finished:
        _check_model(claims)


def _check_checkpoint(claims: Claims, step: int) -> None:
    loaded = claims.load(step)
    assert loaded is not None
    if step > claims.steps:
        raise Mismatch(f"the checkpoint of step {step} is later than the ledger", step)
    saved = Recipe.from_dict(loaded.manifest.recipe, warn=False)
    if differences := list(recipe_differences(saved, claims.recipe)):
        raise Mismatch(
            f"the checkpoint of step {step} is of another recipe: "
            f"{'; '.join(differences)}",
            step,
        )
    if hash_of(loaded.state.parameters) != claims.hashes(step).parameters:
        raise Mismatch(
            f"the parameters of the checkpoint of step {step} are not those of the "
            "ledger",
            step,
        )


def _check_model(claims: Claims) -> None:
    last = claims.steps
    if last not in claims.checkpoints:
        raise Mismatch(f"there is no checkpoint of step {last}, the last one", last)
    loaded = claims.load(last)
    assert loaded is not None
    layout = loaded.manifest.layout
    result = checkpoint.result_of(loaded.state, layout)
    expected = checkpoint.model_bytes(result, layout, claims.recipe)
    try:
        content = untrusted.read_bytes(claims.run.model_file)
    except OSError as error:
        raise Mismatch(f"the final weights cannot be read: {error}") from None
    if content != expected:
        raise Mismatch(
            f"{claims.run.model_file.name} is not the result of the checkpoint of step "
            f"{last}, the last one"
        )
