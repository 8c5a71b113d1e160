"""Find the checkpoint from which a run continues, and check its conditions."""

import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from samestep.config.data import CustomData
from samestep.config.recipe import Recipe
from samestep.errors import CheckpointError, RunError
from samestep.files import untrusted
from samestep.output.run import recipe_file
from samestep.state import checkpoint
from samestep.state.checkpoint import Checkpoint
from samestep.system.conditions import FOUND_BY_WORKERS, deciding, of_machine
from samestep.system.json_values import JsonObject
from samestep.user_code.arguments import recipe_of


@dataclass(frozen=True)
class Start:
    """The state of a run with which `resume` begins."""

    run: Path
    recipe: Recipe
    checkpoint: Checkpoint | None
    warnings: list[str] = field(default_factory=list)
    """Checkpoints that were skipped, and why."""
    former_end: int | None = None
    """The step after which the run was to end, if it is to take more."""

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
        """A line for the user: where the run continues."""
        if self.checkpoint is None:
            return f"{self.run} has no usable checkpoint: it starts from the beginning"
        return f"going on after step {self.step}"

    def forget_end(self) -> None:
        """Remove the checkpoint of the former end.

        There an epoch was closed, and perhaps an evaluation made, that a longer
        training does not have.
        """
        if self.former_end is not None:
            directory = checkpoint.directory_of(self.run)
            path = checkpoint.path_of(directory, self.former_end)
            shutil.rmtree(path, ignore_errors=True)

    def check(self, build: Mapping[str, str]) -> list[str]:
        """Compare the conditions with those of the checkpoint; return warnings.

        Raises CheckpointError if the result could have other bits.
        """
        if self.checkpoint is None:
            return []
        manifest = self.checkpoint.manifest
        # Parsed anew: an older one lacks later fields, or has their old names.
        saved = Recipe.from_dict(manifest.recipe, warn=False)
        return check_conditions((saved, manifest.build), (self.recipe, build))

    @property
    def kept(self) -> dict[str, str]:
        """The checkpoint's conditions that only workers can compare."""
        return kept_for_workers(
            self.checkpoint.manifest.build if self.checkpoint else {}
        )


Conditions = tuple[Recipe, Mapping[str, str]]
"""Everything that decides bits: the recipe, and the rest by name."""


def check_conditions(then: Conditions, now: Conditions) -> list[str]:
    """Compare two sets of conditions, and return warnings.

    Raises CheckpointError if the result could have other bits.
    """
    changed = list(differences(then, now))
    if changed:
        raise CheckpointError(
            "A run continues only under the conditions of its checkpoint, or the "
            f"result would have other bits. These differ: {'; '.join(changed)}"
            ". Restore them, or pass `--allow-different-numerics`."
        )
    unknown = [] if now[0].is_portable else list(_unknown(then[1], now[0]))
    if not unknown:
        return []
    return [
        "The checkpoint was written by an earlier version, which did not store: "
        f"{', '.join(unknown)}. If one of them has changed since, the result has other "
        "bits."
    ]


def kept_for_workers(build: Mapping[str, str]) -> dict[str, str]:
    """Return the conditions in `build` that only workers can compare."""
    return {name: build[name] for name in FOUND_BY_WORKERS if name in build}


def _unknown(build: Mapping[str, str], recipe: Recipe) -> Iterator[str]:
    """Yield the names of conditions that the version of a checkpoint did not store."""
    by_workers = FOUND_BY_WORKERS if isinstance(recipe.data, CustomData) else ()
    yield from (name for name in (*of_machine(), *by_workers) if name not in build)


def find_start(
    run: Path,
    epochs: int | None,
    parts: Mapping[str, str] | None = None,
    max_steps: int | None = None,
) -> Start:
    """Find the newest valid checkpoint of a run, to train to a new length, if any.

    That of the former end is none for more steps. `parts` are the names of the user's
    own model, data or loss, where they were given again. Raises RunError, RecipeError,
    CheckpointError.
    """
    untrusted.check_parts(run)
    recipe = Recipe.load(recipe_file(run), warn=False)
    recipe = recipe_of(recipe, parts or {}, {})
    former = recipe.max_steps if max_steps not in (None, recipe.max_steps) else None
    warnings, newest = [], None
    for _, candidate in checkpoint.newest_valid(checkpoint.directory_of(run), former):
        if isinstance(candidate, Checkpoint):
            newest = candidate
        else:
            warnings.append(f"{candidate} It is skipped.")
    if is_finished(run) and epochs is None and max_steps is None:
        more = f"Use `--epochs N` to train for more than its {recipe.epochs} epochs."
        if recipe.max_steps:
            more = (
                f"It has taken all {recipe.max_steps} steps of its `max_steps`; use "
                "`--max-steps N` for more."
            )
        raise RunError(f"{run} is finished: there is nothing to resume. {more}")
    recipe = _extended(recipe, run, epochs, max_steps, newest)
    return Start(run, recipe, newest, warnings, former)


def is_finished(run: Path) -> bool:
    """Return whether the run has a result.json with the status `finished`."""
    try:
        result = untrusted.parse_json(untrusted.read_bytes(run / "result.json"))
    except (OSError, ValueError):
        return False
    return isinstance(result, dict) and result.get("status") == "finished"


def _extended(
    recipe: Recipe,
    run: Path,
    epochs: int | None,
    max_steps: int | None,
    newest: Checkpoint | None,
) -> Recipe:
    """Return the recipe with its new length.

    Raises RunError if past steps would change, or are more than that.
    """
    lengths = {"epochs": epochs, "max_steps": max_steps}
    given = {name: value for name, value in lengths.items() if value is not None}
    for name, length in given.items():
        flag, former = f"--{name.replace('_', '-')}", getattr(recipe, name)
        if former is None:
            own = "max_steps" if recipe.max_steps else "epochs"
            raise RunError(
                f"{run} ends after `{own}`, {getattr(recipe, own)}, and not after "
                f"`{name}`; received `{flag} {length}`. Leave it out, or train a new "
                "run."
            )
        if length == former:
            continue
        _check_length(recipe, run, name, length, former, newest)
    return Recipe.from_dict(recipe.to_dict() | given) if given else recipe


def _check_length(
    recipe: Recipe,
    run: Path,
    name: str,
    length: int,
    former: int,
    newest: Checkpoint | None,
) -> None:
    unit = name.removeprefix("max_")
    if recipe.schedule.depends_on_epochs:
        raise RunError(
            f"The number of {unit} of {run} is fixed, since its schedule "
            f"`{recipe.schedule.name}` spans all {former} of them: with {length}, "
            "earlier steps would have had other learning rates. Train a new run."
        )
    complete = len(newest.manifest.epochs) if newest else 0
    if name == "max_steps":
        complete = newest.state.step if newest else 0
    if length < complete + (name == "max_steps") or length < 1:
        raise RunError(
            f"{run} has completed {complete} {unit}; {length} cannot be its end. "
            f"Use a larger `--{name.replace('_', '-')}`."
        )


def differences(then: Conditions, now: Conditions) -> Iterator[str]:
    """Yield in words what differs and decides bits."""
    yield from recipe_differences(then[0], now[0])
    cpu = {"device": "cpu"}  # a build names only GPUs
    before, after = (
        cpu | deciding(build, is_portable=now[0].is_portable)
        for build in (then[1], now[1])
    )
    # Older checkpoints lack some conditions, and workers will add theirs later.
    unknown = {
        name
        for name in (*of_machine(), *FOUND_BY_WORKERS)
        if name not in before or name not in after
    }
    yield from _changes("", before, after, unknown)


def recipe_differences(then: Recipe, now: Recipe) -> Iterator[str]:
    """Yield the fields of two recipes that differ and decide the bits of a step."""
    lengths = {"epochs", "max_steps"}
    ignored = {"name"} | (set() if now.schedule.depends_on_epochs else lengths)
    recipes = flatten(then.to_dict()), flatten(now.to_dict())
    yield from _changes("recipe ", *recipes, ignored)


def _changes(
    prefix: str, old: Mapping[str, Any], new: Mapping[str, Any], ignored: set[str]
) -> Iterator[str]:
    for key in sorted((old.keys() | new.keys()) - ignored):
        if old.get(key) != new.get(key):
            yield f"{prefix}{key}: {old.get(key)} then, {new.get(key)} now"


def flatten(fields: Mapping[str, Any], prefix: str = "") -> JsonObject:
    """Return nested fields by their dotted names: `{"a": {"b": 1}}` -> `{"a.b": 1}`."""
    flat: JsonObject = {}
    for key, value in fields.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat
