"""scaling.json and scaling.csv: written whole after every measurement."""

import csv
import fcntl
import io
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from samestep.config.recipe import Recipe
from samestep.errors import OutputError, RunError
from samestep.scaling.grid import MEASURING, Kind, Point, Settings
from samestep.system import atomic_files
from samestep.system.untrusted_files import check_parts, open_to_append, read_bytes


VERSION = 1
FILE, LOCK_FILE = "scaling.json", ".lock"
MACHINE = ("machine", "processor", "logical_cpus", "usable_cores", "libraries")
"""What must agree for measurements to be comparable."""


class Measurement(BaseModel):
    """One point in one round."""

    model_config = ConfigDict(allow_inf_nan=False)

    round: int
    steps: int = Field(ge=1)
    seconds: float = Field(gt=0)
    samples_per_second: float = Field(gt=0)
    """Of all trainings together, if they are several."""
    step_seconds_sd: float
    workers: list[dict[str, float]]
    """Seconds by phase of each worker."""
    bytes_per_step: float
    add_seconds: float = Field(gt=0)
    """Of adding one gradient to another."""
    noise_scale: float | None = None


class _Measured(BaseModel):
    kind: Kind
    workers: int
    global_batch: int
    micro_batches: int
    runs: list[Measurement]


class _Document(BaseModel):
    version: int
    recipe: dict[str, Any]
    environment: dict[str, Any]
    status: str
    settings: Settings
    gradient_bytes: int
    points: list[_Measured]
    calibration: list[_Measured]


@dataclass
class Study:
    """Everything measured so far."""

    path: Path
    """The directory."""
    recipe: Recipe
    environment: dict[str, Any]
    settings: Settings
    gradient_bytes: int = 0
    runs: dict[Point, list[Measurement]] = field(default_factory=dict)
    """In the order of the table."""

    def has(self, round_: int, point: Point) -> bool:
        """Whether it need not be measured again."""
        return any(run.round == round_ for run in self.runs[point])

    def add(self, point: Point, run: Measurement) -> None:
        """In the order of the rounds."""
        self.runs[point].append(run)
        self.runs[point].sort(key=lambda run: run.round)

    def save(self, analysis: dict[str, Any] | None = None) -> None:
        """Writes scaling.json, finished if analysed. Raises OutputError."""
        points = [_point_fields(point, runs) for point, runs in self.runs.items()]
        document: dict[str, Any] = {
            "version": VERSION,
            "recipe": self.recipe.to_dict(),
            "environment": self.environment,
            "status": "measuring" if analysis is None else "finished",
            "settings": self.settings.model_dump(mode="json"),
            "gradient_bytes": self.gradient_bytes,
            "points": [p for p in points if p["kind"] != "calibration"],
            "calibration": [p for p in points if p["kind"] == "calibration"],
        }
        document |= analysis or {}
        write(self.path / FILE, json.dumps(document, indent=1) + "\n")


def _point_fields(point: Point, runs: list[Measurement]) -> dict[str, Any]:
    return {**point._asdict(), "runs": [run.model_dump() for run in runs]}


def write(path: Path, text: str) -> None:
    """Atomically. Raises OutputError."""
    try:
        atomic_files.write(path, text.encode())
    except OSError as error:
        raise OutputError(
            f"{path} cannot be written: {error.strerror}. Free some space and give the "
            "same `--out` again; what was measured until then is kept."
        ) from None


@contextmanager
def open_study(
    path: Path,
    recipe: Recipe,
    environment: dict[str, Any],
    settings: Settings,
    points: list[Point],
) -> Iterator[Study]:
    """A new directory, or an unfinished one with its measurements; locked meanwhile.

    Raises RunError.
    """
    study = Study(path, recipe, environment, settings, 0, {p: [] for p in points})
    _make(path)
    with _locked(path):
        if (path / FILE).exists():
            _take_up(study, read(path / FILE))
        else:
            study.save()
            write(path / "recipe.toml", recipe.to_toml())
            (path / "logs").mkdir(exist_ok=True)
        yield study


def _make(path: Path) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True)
        check_parts(path)
        found = {entry.name for entry in path.iterdir()}
    except OSError as error:
        raise RunError(
            f"The directory {path} cannot be made: {error.strerror}. Choose another "
            "with `--out`."
        ) from None
    if FILE not in found and found - {LOCK_FILE}:
        raise RunError(
            f"{path} is no unfinished scaling measurement: it has no {FILE}. Choose "
            "another `--out`."
        )


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with os.fdopen(open_to_append(path / LOCK_FILE, path), "wb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise RunError(
                f"Another process is measuring into {path}. Wait for it, or choose "
                "another `--out`."
            ) from None
        yield


def read(path: Path) -> _Document:
    """A scaling.json. Raises RunError if it is damaged or of another version."""
    try:
        document = _Document.model_validate_json(read_bytes(path))
    except (OSError, UnicodeDecodeError) as error:
        raise RunError(f"{path} cannot be read: {error}.") from None
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the file"
        raise RunError(
            f"{path} is damaged: {where}: {first['msg'].lower()}. Remove the directory "
            "or choose another `--out`."
        ) from None
    if document.version != VERSION:
        raise RunError(
            f"{path} has version {document.version}; this samestep reads {VERSION}. "
            "Choose another `--out`."
        )
    return document


def _take_up(study: Study, found: _Document) -> None:
    where = study.path
    if found.status != "measuring":
        raise RunError(
            f"{where} is a finished measurement, which is never overwritten. Choose "
            "another `--out`."
        )
    if Recipe.from_dict(found.recipe, warn=False) != study.recipe:
        raise RunError(f"{where} measures another recipe. Choose another `--out`.")
    wanted = study.settings
    for name in (*MEASURING, "rounds"):
        old, new = getattr(found.settings, name), getattr(wanted, name)
        if old != new:
            raise RunError(
                f"{where} was begun with other settings: `{name}` was {_text(old)}, "
                f"now it is {_text(new)}. Give the same, or choose another `--out`."
            )
    for name in MACHINE:
        if found.environment.get(name) != study.environment.get(name):
            raise RunError(
                f"{where} was begun on another machine or installation (`{name}` "
                "differs), so its numbers cannot be mixed with new ones. Choose "
                "another `--out`."
            )
    study.gradient_bytes = found.gradient_bytes
    for old in (*found.points, *found.calibration):
        point = Point(old.kind, old.workers, old.global_batch, old.micro_batches)
        if point in study.runs:
            study.runs[point] = list(old.runs)


def _text(value: object) -> str:
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)


COLUMNS = (
    *("kind", "workers", "global_batch", "micro_batches", "exchange"),
    *("samples_per_second", "low", "high", "step_seconds"),
    *("speedup", "speedup_low", "speedup_high", "efficiency"),
    *("limit_speedup", "efficiency_of_limit"),
)


def to_csv(points: list[dict[str, Any]]) -> str:
    """One line per point; the phases in seconds per step."""
    phases = list(points[0]["seconds_by_phase"]) if points else []
    lines = io.StringIO()
    writer = csv.writer(lines, lineterminator="\n")
    writer.writerow([*COLUMNS, *(f"{phase}_seconds" for phase in phases)])
    for point in points:
        by_phase = point["seconds_by_phase"]
        cells = [point[name] for name in COLUMNS] + [by_phase[name] for name in phases]
        writer.writerow(["" if cell is None else cell for cell in cells])
    return lines.getvalue()
