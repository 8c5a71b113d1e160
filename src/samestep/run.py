"""The run directory: one training and everything about it.

`RunWriter` is used by the supervisor, which alone writes the text files; `Run` reads.
"""

import json
import os
import time
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from samestep import atomic, machine
from samestep.errors import OutputError, RunError
from samestep.placement import Placement
from samestep.recipe import Recipe


MODEL_FILE = "model.safetensors"
EVENTS = {"workers": "workers started", "started": "training"}
"""Reports that become a line in events.jsonl."""


@dataclass(frozen=True)
class Run:
    """A finished or failed training. Raises RunError where the directory is not one."""

    path: Path
    result: Mapping[str, Any]
    """The content of result.json."""

    @classmethod
    def open(cls, path: str | Path) -> "Run":
        """Reads result.json. Raises RunError."""
        path = Path(path)
        if not (path / "recipe.toml").is_file():
            raise RunError(f"{path} is not a run directory: it has no recipe.toml.")
        try:
            return cls(path, json.loads((path / "result.json").read_text()))
        except FileNotFoundError:
            raise RunError(
                f"{path} has no result.json: it is still being trained, or was killed."
            ) from None
        except (OSError, ValueError) as error:
            raise RunError(f"{path}/result.json cannot be read: {error}.") from None

    @property
    def recipe(self) -> Recipe:
        """The resolved recipe. Raises RecipeError."""
        fields = tomllib.loads((self.path / "recipe.toml").read_text())
        return Recipe.from_dict(fields, f"Recipe {self.path}/recipe.toml")

    @property
    def status(self) -> str:
        """`finished`, `failed` or `interrupted`."""
        return str(self.result["status"])

    @property
    def weights_sha256(self) -> str:
        """The fingerprint of the final weights. Raises RunError if there are none."""
        if "weights_sha256" not in self.result:
            raise RunError(
                f"{self.path} has no final weights: its status is {self.status}."
            )
        return str(self.result["weights_sha256"])

    @property
    def history(self) -> list[dict[str, Any]]:
        """One record per epoch."""
        return list(self.result["epochs"])

    @property
    def model_file(self) -> Path:
        """Where the final state_dict is."""
        return self.path / MODEL_FILE


@dataclass
class RunWriter:
    """Writes a run while it is trained. Every method raises OutputError."""

    path: Path
    recipe: Recipe
    placement: Placement
    started: float
    """time.monotonic() when the command began."""
    epochs: list[dict[str, Any]] = field(default_factory=list)

    @classmethod
    def create(
        cls,
        recipe: Recipe,
        placement: Placement,
        data: Mapping[str, Any],
        started: float,
    ) -> "RunWriter":
        """A new directory. Raises RunError if it exists or cannot be made."""
        path = _new_directory(placement.out, recipe.name)
        writer = cls(path, recipe, placement, started)
        writer._write("recipe.toml", recipe.to_toml())
        environment = machine.describe() | {"data": data}
        writer._write("environment.json", json.dumps(environment, indent=2) + "\n")
        writer._append("metrics.jsonl", "")
        writer.event("started", pid=os.getpid(), workers=placement.workers)
        return writer

    @property
    def logs(self) -> Path:
        """The directory of the workers' logs."""
        return self.path / "logs"

    def event(self, name: str, **fields: Any) -> None:
        """One line in events.jsonl, with seconds since the command began."""
        record = {"seconds": time.monotonic() - self.started, "event": name, **fields}
        self._append("events.jsonl", json.dumps(record) + "\n")

    def receive(self, message: Mapping[str, Any]) -> None:
        """A report of rank 0."""
        record = {key: value for key, value in message.items() if key != "rank"}
        if message["type"] in ("step", "epoch"):
            self._append("metrics.jsonl", json.dumps(record) + "\n")
        if message["type"] == "epoch":
            del record["type"]
            self.epochs.append(record)
            self.event("epoch", epoch=record["epoch"], sha256=record["weights_sha256"])
        if message["type"] in EVENTS:
            name = EVENTS[record.pop("type")]
            self.event(name, **record)

    def close(self, status: str, **fields: Any) -> Run:
        """Writes result.json, atomically and last."""
        self.event(status)
        result = {
            "recipe": self.recipe.to_dict(),
            "placement": self.placement.model_dump(mode="json"),
            "status": status,
            **fields,
            "train_seconds": sum(epoch["seconds"] for epoch in self.epochs),
            "wall_seconds": time.monotonic() - self.started,
            "restarts": 0,
            "epochs": self.epochs,
        }
        self._write("result.json", json.dumps(result, indent=2) + "\n")
        return Run(self.path, result)

    def _append(self, name: str, text: str) -> None:
        try:
            with (self.path / name).open("a", encoding="utf-8") as file:
                file.write(text)
        except OSError as error:
            raise _unwritable(self.path / name, error) from None

    def _write(self, name: str, text: str) -> None:
        try:
            atomic.write(self.path / name, text.encode())
        except OSError as error:
            raise _unwritable(self.path / name, error) from None


def first_difference(a: Run, b: Run) -> str | None:
    """What differs first between two runs' weights, in words; None if nothing does.

    Raises RunError if one of them has no final weights.
    """
    finals = a.weights_sha256, b.weights_sha256
    for one, other in zip(a.history, b.history, strict=False):
        if one["weights_sha256"] != other["weights_sha256"]:
            return (
                f"the weights differ from epoch {one['epoch']} on: "
                f"{one['weights_sha256'][:16]} and {other['weights_sha256'][:16]}"
            )
    if len(a.history) != len(b.history):
        return f"the number of epochs differs: {len(a.history)} and {len(b.history)}"
    return None if finals[0] == finals[1] else "the final weights differ"


def read_recipe(path: Path) -> Recipe:
    """The recipe in a file that `samestep.weights.save` wrote. Raises RunError."""
    try:
        with safe_open(path, "numpy") as file:
            metadata = file.metadata() or {}
    except (OSError, SafetensorError) as error:
        raise RunError(f"{path} is not a readable model file: {error}.") from None
    if "recipe" not in metadata:
        raise RunError(
            f"{path} does not carry a recipe, so its model is unknown: use a "
            "`model.safetensors` that samestep wrote."
        )
    return Recipe.from_dict(json.loads(metadata["recipe"]), str(path))


def _new_directory(chosen: Path | None, name: str) -> Path:
    stamp = datetime.now(UTC).strftime("%Y%m%dT%H%M%SZ")
    default = Path("runs") / f"{name}-{stamp}"
    candidates = [chosen] if chosen else [default, *_numbered(default)]
    for path in candidates:
        try:
            path.mkdir(parents=True)
            (path / "logs").mkdir()
        except FileExistsError:
            continue
        except OSError as error:
            raise RunError(
                f"The run directory {path} cannot be made: {error.strerror}. "
                "Choose another with `--out`."
            ) from None
        return path
    raise RunError(
        f"A run never overwrites anything, and {candidates[0]} exists. "
        "Choose another directory with `--out`, or remove this one."
    )


def _numbered(path: Path) -> list[Path]:
    """For runs of one recipe that start in the same second."""
    return [path.with_name(f"{path.name}-{number}") for number in range(2, 100)]


def _unwritable(path: Path, error: OSError) -> OutputError:
    return OutputError(
        f"{path} cannot be written: {error.strerror}. Free some space or choose "
        "another `--out`, and train again."
    )
