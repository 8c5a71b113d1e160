"""A run directory, which has one training and everything about it, as it is read."""

from collections.abc import Mapping
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any, Self

from pydantic import ValidationError
from safetensors import SafetensorError, safe_open

from samestep.config.placement import Placement
from samestep.config.recipe import Recipe
from samestep.errors import RunError
from samestep.files import untrusted
from samestep.output.schema import Result, first_error
from samestep.system.json_values import JsonObject


MODEL_FILE = "model.safetensors"
RECIPE_FILE = "recipe.toml"
LOOP_FILE = "loop.toml"
"""Instead of a recipe, what decides the result of a user's own loop, as far as the loop
knows it."""


def is_of_loop(run: Path) -> bool:
    """Return whether a `samestep.Loop` has written the run."""
    return (run / LOOP_FILE).is_file()


def recipe_file(run: Path) -> Path:
    """Return the file with the recipe of a run. Raises RunError if there is none."""
    if is_of_loop(run):
        raise RunError(
            "This takes a run of `samestep train`, which has a recipe and the weights; "
            f"{run} is of a `samestep.Loop`, whose script has both. Use the script."
        )
    if not (run / RECIPE_FILE).is_file():
        raise RunError(f"{run} is not a run directory: it has no {RECIPE_FILE}.")
    return run / RECIPE_FILE


def what_continues(run: Path) -> str:
    """Return, for a message, what continues a run."""
    return "its script" if is_of_loop(run) else f"`samestep resume {run}`"


@dataclass(frozen=True)
class Settings:
    """What a run records of what is trained, and where."""

    recipe: JsonObject
    placement: JsonObject
    digest: str = ""
    """The SHA-256 of the recipe, for the ledger; empty if there is none."""
    file: str = RECIPE_FILE
    """Which has the recipe."""

    @classmethod
    def of(cls, recipe: Recipe, placement: Placement) -> Self:
        """Return those of `samestep train`."""
        fields = placement.model_dump(mode="json")
        return cls(recipe.to_dict(), fields, recipe.digest)

    @property
    def fields(self) -> JsonObject:
        """Those of result.json."""
        return {"recipe": self.recipe, "placement": self.placement}


@dataclass(frozen=True)
class RunResult:
    """A finished or failed training."""

    path: Path
    result: Mapping[str, Any]
    """The content of result.json."""

    @classmethod
    def open(cls, path: str | Path) -> Self:
        """Read a run directory. Raises RunError if it is none, or has no result."""
        path = Path(path)
        untrusted.check_parts(path)
        if not is_of_loop(path):
            recipe_file(path)
        try:
            result = untrusted.parse_json(untrusted.read_bytes(path / "result.json"))
            Result.model_validate(result)
            return cls(path, result)
        except FileNotFoundError:
            raise RunError(
                f"{path} has no result.json: it is still being trained, or was killed; "
                f"{what_continues(path)} continues it."
            ) from None
        except ValidationError as error:
            raise RunError(
                f"{path}/result.json is damaged: {first_error(error)}."
            ) from None
        except (OSError, ValueError) as error:
            raise RunError(f"{path}/result.json cannot be read: {error}.") from None

    @property
    def recipe(self) -> Recipe:
        """The resolved recipe. Raises RecipeError, RunError if there is none."""
        return Recipe.load(recipe_file(self.path), warn=False)

    @property
    def status(self) -> str:
        """`finished`, `failed` or `interrupted`."""
        return str(self.result["status"])

    def require_weights(self) -> None:
        """Raise RunError if the training has not ended with final weights."""
        if not self.result.get("weights_sha256"):
            raise RunError(
                f"{self.path} has no final weights: its status is {self.status}."
            )

    @property
    def weights_sha256(self) -> str:
        """The fingerprint of the final weights. Raises RunError if there are none."""
        self.require_weights()
        return str(self.result["weights_sha256"])

    @property
    def history(self) -> list[JsonObject]:
        """One record per epoch; `pandas.DataFrame(run.history)` is a table of them."""
        return list(self.result.get("epochs", []))

    def _repr_html_(self) -> str:
        """Return a small HTML table, which notebooks show."""
        rows = {"run": self.path, "status": self.status, **_measured(self)}
        cells = "".join(
            f"<tr><th style='text-align:left'>{escape(str(name))}</th>"
            f"<td style='text-align:left'>{escape(str(value))}</td></tr>"
            for name, value in rows.items()
        )
        return f"<table>{cells}</table>"

    @property
    def model_file(self) -> Path:
        """Where the final state_dict is. Raises RunError without a recipe."""
        return recipe_file(self.path).with_name(MODEL_FILE)


def _measured(run: RunResult) -> JsonObject:
    """Return the figures for the table in notebooks."""
    records = {"test": run.result, "validation": (run.history or [{}])[-1]}
    figures = {
        f"{split} {key.removeprefix(f'{split}_').replace('_', ' ')}": f"{value:.4f}"
        for split, record in records.items()
        for key, value in record.items()
        if key.startswith(f"{split}_") and isinstance(value, float)
    }
    seconds = run.result.get("train_seconds")
    if seconds is not None:
        figures["training"] = f"{seconds:.2f} s, {len(run.history)} epochs"
    if run.result.get("weights_sha256"):
        figures["weights"] = f"sha256 {run.weights_sha256}"
    return figures


def first_difference(a: RunResult, b: RunResult) -> str | None:
    """Say what differs first between the weights of two runs; None: nothing.

    Raises RunError if one of them has no final weights.
    """
    finals = a.weights_sha256, b.weights_sha256
    for one, other in zip(a.history, b.history, strict=False):
        ours, theirs = (str(epoch.get("weights_sha256")) for epoch in (one, other))
        if ours != theirs:
            return (
                f"the weights differ from epoch {one['epoch']} on: "
                f"{ours[:16]} and {theirs[:16]}"
            )
    if len(a.history) != len(b.history):
        return f"the number of epochs differs: {len(a.history)} and {len(b.history)}"
    return None if finals[0] == finals[1] else "the final weights differ"


def read_recipe(path: Path) -> Recipe:
    """Return the recipe in the metadata of a model file. Raises RunError."""
    try:
        untrusted.check_regular(path)
        with safe_open(path, "numpy") as file:
            metadata = file.metadata() or {}
    except (OSError, SafetensorError) as error:
        raise RunError(f"{path} is not a readable model file: {error}.") from None
    if "recipe" not in metadata:
        raise RunError(
            f"{path} does not carry a recipe, so its model is unknown: use a "
            "`model.safetensors` that samestep wrote."
        )
    try:
        fields = untrusted.parse_json(metadata["recipe"])
    except ValueError as error:
        raise RunError(f"The recipe in {path} is not JSON: {error}.") from None
    return Recipe.from_dict(fields, str(path), warn=False)
