"""scaling.json and scaling.csv, written whole after every measurement."""

import csv
import io
import json
import os
import statistics
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from samestep.config.recipe import Recipe
from samestep.errors import OutputError, RunError
from samestep.files import atomic, lock
from samestep.files.untrusted import check_parts, read_bytes
from samestep.output import schema
from samestep.scaling.grid import MEASURING, Kind, Point, Settings
from samestep.system.json_values import JsonObject


VERSION = 1
FILE, LOCK_FILE = "scaling.json", ".lock"
MACHINE = ("machine", "processor", "logical_cpus", "usable_cores", "libraries")
"""The facts that must agree for measurements to be comparable."""


class Measurement(BaseModel):
    """One point in one round."""

    model_config = ConfigDict(allow_inf_nan=False)

    round: int
    steps: int = Field(ge=1)
    seconds: float = Field(gt=0)
    samples_per_second: float = Field(gt=0)
    """All trainings together, if there are several."""
    step_seconds_sd: float
    workers: list[dict[str, float]]
    """Seconds by phase of each worker."""
    bytes_per_step: float
    add_seconds: float = Field(gt=0)
    """The time to add one gradient to another."""
    noise_scale: float | None = None

    def per_step(self, phase: str) -> float:
        """Return seconds per step of a phase, mean over the workers."""
        return statistics.fmean(worker[phase] for worker in self.workers) / self.steps


class _Measured(BaseModel):
    kind: Kind
    workers: int
    global_batch: int
    micro_batches: int
    runs: list[Measurement]


class _Document(BaseModel):
    version: int
    recipe: JsonObject
    environment: JsonObject
    status: str
    settings: Settings
    gradient_bytes: int
    points: list[_Measured]
    calibration: list[_Measured]


@dataclass
class Study:
    """All measurements so far."""

    path: Path
    """The directory."""
    recipe: Recipe
    environment: JsonObject
    settings: Settings
    gradient_bytes: int = 0
    runs: dict[Point, list[Measurement]] = field(default_factory=dict)
    """In the order of the table."""

    def add(self, point: Point, run: Measurement) -> None:
        """Add a measurement, in the order of the rounds."""
        self.runs[point].append(run)
        self.runs[point].sort(key=lambda run: run.round)

    def save(self, analysis: schema.Analysis | None = None) -> None:
        """Write scaling.json, finished if analysed. Raises OutputError."""
        points = [
            {**point._asdict(), "runs": [run.model_dump() for run in runs]}
            for point, runs in self.runs.items()
        ]
        document: JsonObject = {
            "version": VERSION,
            "recipe": self.recipe.to_dict(),
            "environment": self.environment,
            "status": "measuring" if analysis is None else "finished",
            "settings": self.settings.model_dump(mode="json"),
            "gradient_bytes": self.gradient_bytes,
            "points": [p for p in points if p["kind"] != "calibration"],
            "calibration": [p for p in points if p["kind"] == "calibration"],
        }
        document |= analysis.model_dump() if analysis else {}
        write(self.path / FILE, json.dumps(document, indent=1) + "\n")


def write(path: Path, text: str) -> None:
    """Write a file atomically. Raises OutputError."""
    try:
        atomic.write(path, text.encode())
    except OSError as error:
        raise OutputError(
            f"{path} cannot be written: {error.strerror}. Free some space and use the "
            "same `--out` again: the measurements so far are kept."
        ) from None


@contextmanager
def open_study(
    path: Path,
    recipe: Recipe,
    environment: JsonObject,
    settings: Settings,
    points: list[Point],
) -> Iterator[Study]:
    """Open a new study, or an unfinished one with its measurements, and lock it.

    Raises RunError.
    """
    study = Study(path, recipe, environment, settings, 0, {p: [] for p in points})
    # Locked until the end: two commands must not measure on the same cores.
    fd = _lock(path)
    try:
        if (path / FILE).exists():
            _resume(study, read(path / FILE))
        else:
            study.save()
            write(path / "recipe.toml", recipe.to_toml())
        (path / "logs").mkdir(exist_ok=True)
        yield study
    finally:
        os.close(fd)


def _lock(path: Path) -> int:
    """Make the directory, and return the descriptor that locks it. Raises RunError."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        check_parts(path)
        names = {entry.name for entry in path.iterdir()}
        if FILE not in names and names - {LOCK_FILE}:
            raise RunError(
                f"{path} is not an unfinished scaling study: it has no {FILE}. Choose "
                "another `--out`."
            )
        fd = lock.acquire(path / LOCK_FILE)
    except OSError as error:
        raise RunError(
            f"The directory {path} cannot be created or locked: {error.strerror}. "
            "Choose another with `--out`."
        ) from None
    if fd is None:
        raise RunError(
            f"Another process is measuring into {path}. Wait for it, or choose "
            "another `--out`."
        )
    return fd


def read(path: Path) -> _Document:
    """Read a scaling.json. Raises RunError if it is damaged or of another version."""
    try:
        document = _Document.model_validate_json(read_bytes(path))
    except (OSError, UnicodeDecodeError) as error:
        raise RunError(f"{path} cannot be read: {error}.") from None
    except ValidationError as error:
        raise RunError(
            f"{path} is damaged: {schema.first_error(error)}. Remove the directory or "
            "choose another `--out`."
        ) from None
    if document.version != VERSION:
        raise RunError(
            f"{path} has version {document.version}; this samestep reads {VERSION}. "
            "Choose another `--out`."
        )
    return document


def _resume(study: Study, document: _Document) -> None:
    """Take over the measurements of a file. Raises RunError if they do not fit."""
    where = study.path
    if document.status != "measuring":
        raise RunError(
            f"{where} is a finished study, which is never overwritten. Choose another "
            "`--out`."
        )
    if Recipe.from_dict(document.recipe, warn=False) != study.recipe:
        raise RunError(f"{where} measures another recipe. Choose another `--out`.")
    for name in (*MEASURING, "rounds"):
        old, new = getattr(document.settings, name), getattr(study.settings, name)
        if old != new:
            raise RunError(
                f"{where} was begun with other settings: `{name}` was {_text(old)}, "
                f"now it is {_text(new)}. Use the same, or choose another `--out`."
            )
    for name in MACHINE:
        if document.environment.get(name) != study.environment.get(name):
            raise RunError(
                f"{where} was begun on another machine or installation (`{name}` "
                "differs), so its numbers cannot be mixed with new ones. Choose "
                "another `--out`."
            )
    study.gradient_bytes = document.gradient_bytes
    for old in (*document.points, *document.calibration):
        point = Point(old.kind, old.workers, old.global_batch, old.micro_batches)
        if point in study.runs:
            study.runs[point] = list(old.runs)


def _text(value: object) -> str:
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)


def to_csv(points: list[schema.Point]) -> str:
    """Return a line for each point, with the phases in seconds per step."""
    fields = [*schema.Point.model_fields]
    fields.remove("runs")
    fields.remove("seconds_by_phase")
    phases = [f"{phase}_seconds" for phase in points[0].seconds_by_phase]
    lines = io.StringIO()
    writer = csv.writer(lines, lineterminator="\n")
    writer.writerow([*fields, *phases])
    for point in points:
        cells = [getattr(point, field) for field in fields]
        writer.writerow([*cells, *point.seconds_by_phase.values()])
    return lines.getvalue()
