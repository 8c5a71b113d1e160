"""Reads a run directory: one training and everything about it."""

from collections.abc import Mapping
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any, Self

from pydantic import ValidationError
from safetensors import SafetensorError, safe_open

from samestep.config.recipe import Recipe
from samestep.errors import RunError
from samestep.files import untrusted
from samestep.output.schema import Result, first_error
from samestep.system.json_values import JsonObject


MODEL_FILE = "model.safetensors"


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
        if not (path / "recipe.toml").is_file():
            raise RunError(f"{path} is not a run directory: it has no recipe.toml.")
        try:
            result = untrusted.parse_json(untrusted.read_bytes(path / "result.json"))
            Result.model_validate(result)
            return cls(path, result)
        except FileNotFoundError:
            raise RunError(
                f"{path} has no result.json: it is still being trained, or was killed; "
                f"`samestep resume {path}` continues it."
            ) from None
        except ValidationError as error:
            raise RunError(
                f"{path}/result.json is damaged: {first_error(error)}."
            ) from None
        except (OSError, ValueError) as error:
            raise RunError(f"{path}/result.json cannot be read: {error}.") from None

    @property
    def recipe(self) -> Recipe:
        """The resolved recipe. Raises RecipeError."""
        return Recipe.load(self.path / "recipe.toml", warn=False)

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
        """Where the final state_dict is."""
        return self.path / MODEL_FILE


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
