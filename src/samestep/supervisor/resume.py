"""Where a run goes on: its newest valid checkpoint, if the conditions are the same."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from samestep.config.data import CustomData
from samestep.config.recipe import Recipe
from samestep.errors import CheckpointError, RunError
from samestep.messages.wire import JsonObject
from samestep.output.run import RunResult
from samestep.state import checkpoint
from samestep.state.checkpoint import Checkpoint
from samestep.system import untrusted_files
from samestep.system.conditions import FOUND_BY_WORKERS, of_machine
from samestep.user_code.arguments import recipe_of


ENDLESS = ("constant", "step")
"""Schedules whose earlier part does not depend on the number of epochs."""


@dataclass(frozen=True)
class Start:
    """What `resume` begins with."""

    run: Path
    recipe: Recipe
    checkpoint: Checkpoint | None
    warnings: list[str] = field(default_factory=list)
    """Checkpoints that were skipped, and why."""

    @property
    def step(self) -> int:
        """Optimizer steps already taken."""
        return self.checkpoint.state.step if self.checkpoint else 0

    @property
    def epochs(self) -> list[JsonObject]:
        """The records of complete epochs."""
        return list(self.checkpoint.manifest.epochs) if self.checkpoint else []

    @property
    def headline(self) -> str:
        """Where it goes on, in words."""
        if self.checkpoint is None:
            return f"{self.run} has no usable checkpoint: it starts from the beginning"
        return f"going on after step {self.step}"

    def check(self, build: Mapping[str, str]) -> list[str]:
        """Raises CheckpointError if the result could have other bits.

        Returns warnings.
        """
        if self.checkpoint is None:
            return []
        manifest = self.checkpoint.manifest
        # Parsed anew: an older one lacks later fields, or has their old names.
        saved = Recipe.from_dict(manifest.recipe, warn=False)
        return check_conditions((saved, manifest.build), (self.recipe, build))

    @property
    def kept(self) -> dict[str, str]:
        """The conditions that only the workers can compare."""
        return kept_for_workers(
            self.checkpoint.manifest.build if self.checkpoint else {}
        )


Conditions = tuple[Recipe, Mapping[str, str]]
"""What decides bits: the recipe and everything else."""


def check_conditions(then: Conditions, now: Conditions) -> list[str]:
    """Raises CheckpointError if the result could have other bits; returns warnings."""
    differences = list(_differences(then, now))
    if differences:
        raise CheckpointError(
            "A run goes on only under the conditions of its checkpoint, or the "
            f"result would have other bits. Different are: {'; '.join(differences)}"
            ". Restore them, or pass `--allow-different-numerics`."
        )
    unknown = list(_unknown(then[1], now[0]))
    if not unknown:
        return []
    return [
        "The checkpoint was written by an earlier version, which did not keep: "
        f"{', '.join(unknown)}. If one of them was another then, the result has other "
        "bits."
    ]


def kept_for_workers(build: Mapping[str, str]) -> dict[str, str]:
    """Those of a build that only the workers can compare."""
    return {name: build[name] for name in FOUND_BY_WORKERS if name in build}


def _unknown(build: Mapping[str, str], recipe: Recipe) -> Iterator[str]:
    """What checkpoints have kept only since a later version."""
    by_workers = FOUND_BY_WORKERS if isinstance(recipe.data, CustomData) else ()
    yield from (name for name in (*of_machine(), *by_workers) if name not in build)


def find_start(
    run: Path, epochs: int | None, parts: Mapping[str, str] | None = None
) -> Start:
    """`parts` name the user's own model, data or loss again.

    Raises RunError, RecipeError, CheckpointError.
    """
    untrusted_files.check_parts(run)
    if not (run / "recipe.toml").is_file():
        raise RunError(f"{run} is not a run directory: it has no recipe.toml.")
    recipe = Recipe.load(run / "recipe.toml", warn=False)
    recipe = recipe_of(recipe, parts or {}, {})
    warnings, found = [], None
    for _, candidate in checkpoint.newest_valid(checkpoint.directory_of(run)):
        if isinstance(candidate, Checkpoint):
            found = candidate
        else:
            warnings.append(f"{candidate} It is skipped.")
    complete = len(found.manifest.epochs) if found else 0
    recipe = _extended(recipe, run, epochs, complete)
    if is_finished(run) and epochs is None:
        raise RunError(
            f"{run} is finished: there is nothing to resume. Use `--epochs N` to train "
            f"for more than its {recipe.epochs} epochs."
        )
    return Start(run, recipe, found, warnings)


def is_finished(run: Path) -> bool:
    """Whether its result.json says so."""
    try:
        return RunResult.open(run).status == "finished"
    except RunError:
        return False


def _extended(recipe: Recipe, run: Path, epochs: int | None, complete: int) -> Recipe:
    """The recipe with another number of epochs, where that keeps the earlier steps."""
    if epochs is None or epochs == recipe.epochs:
        return recipe
    if recipe.schedule.name not in ENDLESS:
        raise RunError(
            f"The number of epochs of {run} is fixed, since its schedule "
            f"`{recipe.schedule.name}` spans all {recipe.epochs} of them: with "
            f"{epochs} the learning rates so far would have been others. Train a new "
            "run."
        )
    if epochs < max(complete, 1):
        raise RunError(
            f"{run} has completed {complete} epochs; {epochs} cannot be its end. "
            "Use a larger `--epochs`."
        )
    return Recipe.from_dict(recipe.to_dict() | {"epochs": epochs})


def _differences(then: Conditions, now: Conditions) -> Iterator[str]:
    saved, recipe = then[0], now[0]
    before, after = flatten(saved.to_dict()), flatten(recipe.to_dict())
    for ignored in ("name", *(["epochs"] if recipe.schedule.name in ENDLESS else [])):
        before.pop(ignored), after.pop(ignored)
    cpu = {"device": "cpu"}  # not named in a build
    machines: list[JsonObject] = [cpu | dict(build) for build in (then[1], now[1])]
    for name in (*of_machine(), *FOUND_BY_WORKERS):
        if not all(name in build for build in machines):  # not known, or not yet
            machines[0].pop(name, None), machines[1].pop(name, None)
    pairs = [("recipe ", before, after), ("", machines[0], machines[1])]
    for prefix, old, new in pairs:
        for key in sorted(old.keys() | new.keys()):
            if old.get(key) != new.get(key):
                yield f"{prefix}{key}: {old.get(key)} then, {new.get(key)} now"


def flatten(fields: Mapping[str, Any], prefix: str = "") -> JsonObject:
    """`{"a": {"b": 1}}` -> `{"a.b": 1}`."""
    flat: JsonObject = {}
    for key, value in fields.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat
